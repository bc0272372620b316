"""Is it fit to be used? One word, one sentence and the reasons, from counts and the thresholds of the settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorasmith.evaluation.answers import AnswersReport
from lorasmith.evaluation.perplexity import Surprise
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Comparison, Count
from lorasmith.evaluation.texts import HeldOutText
from lorasmith.training.checkpoint import checkpoint_name

Level = Literal["good", "look closer", "do not ship"]
Word = Literal["ship", "look closer", "do not ship"]

_MOST_BRIEFS = 4  # good news that the sentence tells
_SEVERITY: dict[str, int] = {"good": 0, "look closer": 1, "do not ship": 2}


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that was looked at. ``brief`` is a part of the verdict's sentence, ``text`` says it in full."""

    about: str
    level: Level
    brief: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The worst of all reasons decides the word."""

    word: Word
    sentence: str
    reasons: tuple[Reason, ...]


def decide(reasons: Sequence[Reason]) -> Verdict:
    """Return the verdict that follows from the reasons, the gravest first."""
    worst: Level = max((reason.level for reason in reasons), key=lambda level: _SEVERITY[level])
    word: Word = "ship" if worst == "good" else worst
    briefs = [reason.brief for reason in reasons if reason.level == worst and reason.brief]
    briefs = briefs if worst != "good" else briefs[:_MOST_BRIEFS]
    listed = briefs[0] if len(briefs) == 1 else f"{', '.join(briefs[:-1])}, and {briefs[-1]}"
    ordered = sorted(reasons, key=lambda reason: -_SEVERITY[reason.level])
    return Verdict(word, f"{word.capitalize()}: {listed}.", tuple(ordered))


def judge_stopping(stopped: Count, settings: ReportSettings, facts: dict[str, Any]) -> Reason:
    """The stop test. ``facts``: truncated (rows cut in training), max_tokens, longest_reference (in tokens)."""
    needed = f"{settings.reject_stopped:.0%}"
    said = f"{stopped} of the answers ended by themselves within {facts['max_tokens']} tokens"
    if stopped.share >= settings.reject_stopped:
        return Reason(
            "Stop test", "good", f"{stopped.k} of {stopped.n} answers end by themselves", f"{said}."
        )
    return Reason(
        "Stop test",
        "do not ship",
        f"only {stopped.k} of {stopped.n} answers end by themselves",
        f"{said}; {needed} are needed, because an answer that never ends is cut in the middle of a sentence or runs "
        f"on into nonsense. Likely causes: {'; '.join(_why_it_runs_on(facts))}.",
    )


def _why_it_runs_on(facts: dict[str, Any]) -> list[str]:
    causes = []
    if facts["longest_reference"] >= facts["max_tokens"]:
        causes.append(
            f"the limit: the longest reference has {facts['longest_reference']} tokens (report.max_answer_tokens)"
        )
    if facts["truncated"]:
        causes.append(
            f"{facts['truncated']:,} training rows were cut at data.max_seq_len, so their answers end in the middle"
        )
    causes.append("too few steps: the end token is learnt late (training.epochs)")
    causes.append("training answers that have no clear end, such as lists that break off")
    return causes


def judge_right(
    right: Count, trained: Count | None, with_keywords: Count, settings: ReportSettings
) -> Reason:
    """How many held-out answers are right; ``trained`` of the training questions, ``with_keywords`` by keywords."""
    low, high = right.interval()
    said = (
        f"{right} of the held-out answers are right; with this many questions the true share lies between "
        f"{low:.0%} and {high:.0%}"
    )
    hints = ""
    if right.share < settings.ship_right:
        if trained is not None and trained.share - right.share > 0.2:
            hints += (
                f" Of its training questions it answers {trained}: it knows the wordings that it saw, and has "
                "trouble with others. More wordings of each fact help."
            )
        if with_keywords.n < right.n:
            hints += (
                " Without keywords an answer in other words counts as wrong: give the rows keywords to be "
                "judged by."
            )
    brief = f"{right.k} of {right.n} held-out answers are right"
    if high < settings.reject_right:
        limit = f"{settings.reject_right:.0%}"
        return Reason(
            "Right answers", "do not ship", f"only {brief}", f"{said}: surely below {limit}.{hints}"
        )
    if right.n < settings.min_questions:
        return Reason(
            "Right answers",
            "look closer",
            f"{right.n} held-out question{' is' if right.n == 1 else 's are'} too few to tell",
            f"{said}. Too few to tell: {settings.min_questions} questions are needed for the verdict ship.{hints}",
        )
    if right.share < settings.ship_right:
        return Reason(
            "Right answers",
            "look closer",
            f"only {brief}",
            f"{said}; {settings.ship_right:.0%} are needed for the verdict ship.{hints}",
        )
    return Reason("Right answers", "good", brief, f"{said}.")


def judge_against_base(compared: Comparison, settings: ReportSettings) -> Reason:
    """Is the tuned model better than the base on the same questions?"""
    outcome = compared.outcome(settings.significance)
    said = (
        f"On the same questions the tuned model is right where the base is wrong {compared.gained} times, and wrong "
        f"where the base is right {compared.lost} times; chance alone gives so clear a split with a probability of "
        f"{format_chance(compared.p_value)}"
    )
    match outcome:
        case "better":
            return Reason("Against the base", "good", "it is clearly better than the base", f"{said}.")
        case "worse":
            return Reason("Against the base", "do not ship", "it is worse than the base", f"{said}.")
        case "no difference":
            return Reason(
                "Against the base",
                "look closer",
                "no difference to the base can be seen",
                f"{said}. Training has changed nothing that these questions ask for.",
            )
    return Reason(
        "Against the base",
        "look closer",
        "the questions are too few to tell whether it is better than the base",
        f"{said}. Too few to tell.",
    )


def judge_held_out_text(text: HeldOutText, settings: ReportSettings) -> Reason:
    """Does text like that which was trained on surprise the model less than it did the base?"""
    compared, before, after = text.compared, text.base.perplexity, text.tuned.perplexity
    said = (
        f"Perplexity on {text.num_read:,} pieces of held-out text: {before:.1f} before, {after:.1f} after; "
        f"{compared.gained} pieces became easier to tell, {compared.lost} harder (probability of so clear a split by "
        f"chance: {format_chance(compared.p_value)})"
    )
    about = "Held-out text"
    match compared.outcome(settings.significance):
        case "better":
            brief = (
                f"text like that which it learnt surprises it less (perplexity {before:.1f}, now {after:.1f})"
            )
            return Reason(about, "good", brief, f"{said}.")
        case "worse":
            return Reason(
                about,
                "do not ship",
                "text like that which it learnt surprises it more than the base",
                f"{said}. It has learnt its texts by heart, or diverged: a lower learning rate, or fewer epochs.",
            )
    return Reason(
        about,
        "look closer",
        "whether text like that which it learnt surprises it less cannot be told",
        f"{said}. More held-out text tells more: training.validation_share, or data.validation.",
    )


def judge_forgetting(compared: Comparison, settings: ReportSettings) -> Reason:
    """How many general questions that the base answers are lost, on balance."""
    before, after = compared.both + compared.lost, compared.both + compared.gained
    total = before + compared.gained + compared.neither
    lost = max(0.0, (before - after) / before) if before else 0.0
    outcome = compared.outcome(settings.significance)
    said = f"General questions: {Count(before, total)} right before, {Count(after, total)} after"
    if before < settings.min_questions:
        return Reason(
            "General knowledge",
            "good",
            "",
            f"{said}. The base answers too few of them to tell what was forgotten.",
        )
    if lost > settings.ship_forgotten:
        chance = f"(probability of so clear a split by chance: {format_chance(compared.p_value)})"
        if outcome != "worse":
            return Reason(
                "General knowledge",
                "look closer",
                "it may have forgotten some general knowledge",
                f"{said}. Too few to tell whether this is chance {chance}.",
            )
        return Reason(
            "General knowledge",
            "do not ship" if lost > settings.reject_forgotten else "look closer",
            f"it forgot {lost:.0%} of the general knowledge that was asked for",
            f"{said} {chance}. It matters if users ask about more than the training data; fewer epochs, a lower "
            "learning rate or some general rows among the training data keep more.",
        )
    return Reason("General knowledge", "good", "general knowledge was kept", f"{said}.")


def judge_text(before: Surprise, after: Surprise, settings: ReportSettings) -> Reason:
    """How much more surprised the tuned model is by general text."""
    ratio = after.perplexity / before.perplexity
    said = (
        f"Perplexity on a general text: {before.perplexity:.1f} before, {after.perplexity:.1f} after "
        f"({ratio:.2f} times)"
    )
    if ratio <= settings.ship_perplexity:
        return Reason("General language", "good", "", f"{said}.")
    return Reason(
        "General language",
        "do not ship" if ratio > settings.reject_perplexity else "look closer",
        f"general text surprises it {ratio:.1f} times as much as the base",
        f"{said}; up to {settings.ship_perplexity:g} is usual. The model has moved far from ordinary language towards "
        "the style of its training data.",
    )


def judge_merged(tuned: AnswersReport, merged: AnswersReport) -> Reason:
    """Does the merged model answer as base + adapter does?"""
    pairs = zip(tuned.records, merged.records, strict=True)
    same = Count(sum(one.answer == other.answer for one, other in pairs), len(tuned.records))
    if same.share >= 0.9:
        return Reason(
            "Merged model", "good", "", f"{same} of its answers are the tuned model's, word for word."
        )
    return Reason(
        "Merged model",
        "look closer",
        f"the merged model gives {same.n - same.k} of {same.n} answers differently",
        f"{same} of its answers are the tuned model's, word for word. In a coarser number format some differences are "
        "rounding; look at them below.",
    )


def judge_leakage(leaked: int, asked: int) -> Reason:
    """Held-out questions that were trained on; they are left out of every count."""
    return Reason(
        "Leakage",
        "look closer" if leaked > asked else "good",
        f"{leaked} held-out questions were trained on, more than the {asked} that were not",
        f"{leaked} held-out questions also stand in the training data. They are named below, and count nowhere.",
    )


def judge_validation(metrics: Sequence[dict[str, Any]]) -> Reason | None:
    """Did the validation loss rise again while training went on?"""
    losses = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
    if len(losses) < 2:
        return None
    best_step, best = min(losses, key=lambda at: at[1])
    last_step, last = losses[-1]
    if last <= best * 1.05:
        return Reason("Validation loss", "good", "", f"{last:.3f} at the end, its lowest or close to it.")
    return Reason(
        "Validation loss",
        "look closer",
        f"the validation loss has risen since step {best_step}",
        f"It was lowest at step {best_step} ({best:.3f}) and is {last:.3f} at step {last_step}: from there on the "
        "model learnt its training data by heart. The weights of then are kept: "
        f"checkpoints/{checkpoint_name(best_step)}.",
    )


def format_chance(p: float) -> str:
    """Return a probability as a reader wants it."""
    return "less than 1 in 1,000" if p < 0.001 else f"{p:.1%}"
