"""The two measures are those of the packages, and work on other alphabets than the Latin one."""

import subprocess
import sys

import pytest

from lorasmith.evaluation.likeness import chrf, rouge_l


def test_rouge_l_is_the_f_measure_of_the_common_subsequence():
    # police killed the gunman / police kill the gunman: 3 of 4 words (Lin 2004, section 3.2)
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    assert rouge_l("On the 1st.", "on the 1st") == 1
    assert rouge_l("anything", "") == 0


def test_other_alphabets_count():
    assert rouge_l("Lương được trả vào ngày 1.", "lương được trả vào ngày 15") == pytest.approx(5 / 6)
    assert chrf("工资在一号支付", "工资在一号支付") == pytest.approx(100)
    assert 0 < chrf("工资在一号支付", "工资在二号支付") < 100


def test_neither_is_imported_before_it_is_used():
    code = (
        "import sys, lorasmith.evaluation.likeness; print('nltk' in sys.modules, 'sacrebleu' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
