"""The probe's questions can be answered by their own references, and its text is there."""

from lorasmith.evaluation.facts import has_keywords
from lorasmith.evaluation.probe import general_questions, general_text


def test_sixty_questions_whose_references_have_their_keywords():
    rows = general_questions()
    assert len(rows) == 60
    assert len({row.question for row in rows}) == 60
    for row in rows:
        assert row.keywords
        assert has_keywords(row.keywords, row.reference), row
        assert not has_keywords(row.keywords, row.question), row  # an echo is no answer


def test_the_text_is_several_passages_of_some_length():
    passages = general_text()
    assert len(passages) == 7
    assert all(len(passage.split()) > 60 for passage in passages)
