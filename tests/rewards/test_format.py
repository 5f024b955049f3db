"""`format`: sections, box and scripts, as checks that pass or fail one by one."""

import pickle

import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec, load_verifier

R1 = {"sections": ["think", "answer"], "only_sections": True}


def grade(options, response):
    return load_verifier(VerifierSpec("format", options)).verify(response, "any", meta={})


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("<think>2+2</think>\n<answer>4</answer>\n", None),
        ("<think>2+2</think><answer>4</answer> Done.", "text outside of the sections"),
        ("<answer>4</answer><think>2+2</think>", "the sections must follow each other: think, answer"),
        ("<think>2+2<answer>4</answer></think>", "the sections must follow each other"),
        ("<think> \n</think><answer>4</answer>", "<think> is empty"),
        ("<think>2</think><answer>4</answer><answer>5</answer>", "<answer>…</answer> must stand exactly once"),
        ("<think>2</think><answer>4", "<answer>…</answer> must stand exactly once"),
        ("</think>2<think><answer>4</answer>", "<think>…</think> must stand exactly once"),
        ("4", "<think>…</think> must stand exactly once"),
    ],
)
def test_sections(response, reason):
    verdict = grade(R1, response)
    assert (verdict.score, verdict.status) == ((1.0, "correct") if reason is None else (0.0, "incorrect"))
    assert reason is None or verdict.info["reason"].startswith(reason)


def test_a_section_that_the_prompt_opened():
    options = {"sections": ["think", "answer"], "prefilled": True}
    assert grade(options, "2+2</think><answer>4</answer>").score == 1.0
    assert grade(options, "<think>2+2</think><answer>4</answer>").score == 0.0


def test_partial_score_is_the_share_of_checks_passed():
    """Four checks: think, answer, their order, a box; where a section is missing, the order cannot be right."""
    options = {"sections": ["think", "answer"], "box": True, "partial": True}
    assert grade(options, r"<think>a</think><answer>\boxed{4}</answer>").score == 1.0
    assert grade(options, r"<think>a</think>\boxed{4}").score == pytest.approx(2 / 4)
    assert grade(options, "nothing").score == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"so \boxed{\frac{1}{2}}", 1.0),
        (r"so \boxed{4", 0.0),
        (r"so \boxed{ }", 0.0),
        (r"<think>\boxed{4}</think> 4", 0.0),
        ("4", 0.0),
    ],
)
def test_box(response, score):
    assert grade({"box": True}, response).score == score


@pytest.mark.parametrize(
    ("options", "response", "score"),
    [
        ({"forbid_scripts": ["cjk"]}, "The answer is 4, naïve café, α.", 1.0),
        ({"forbid_scripts": ["cjk"]}, "The answer is 四.", 0.0),
        ({"forbid_scripts": ["cjk"]}, "こたえ", 0.0),
        ({"script": "latin"}, "Die Größe ist 4.", 1.0),
        ({"script": "latin"}, "Ответ is 4.", 0.0),
        ({"script": "latin", "script_share": 0.9}, "a" * 90 + "я" * 10, 1.0),
        ({"script": "latin", "script_share": 0.9}, "a" * 89 + "я" * 11, 0.0),
        ({"script": "latin"}, "ＡＢＣ 𝐱𝐲 4", 1.0),
        ({"script": "han"}, r"\frac{1}{2} 是答案", 1.0),
        ({"script": "han", "sections": ["answer"]}, "<answer>答案</answer>", 1.0),
        ({"script": "cyrillic"}, "4 = 4", 1.0),
    ],
)
def test_language(options, response, score):
    assert grade(options, response).score == score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to check"),
        ({"sections": "think"}, "are lists"),
        ({"sections": ["<think>"]}, "without brackets"),
        ({"sections": ["a", "a"]}, "twice"),
        ({"script": "klingon"}, "script 'klingon': use one of"),
        ({"script": "latin", "script_share": 0}, "script_share 0"),
        ({"box": True, "prefilled": True}, "speak of sections"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(VerifierLoadError, match=message) as caught:
        load_verifier(VerifierSpec("format", options))
    assert "\n" not in str(caught.value)


def test_in_the_pool_whatever_the_gold_and_however_long():
    with VerifierHost(VerifierSpec("format", R1 | {"forbid_scripts": ["cjk"]}), timeout=1.0) as host:
        good, bad = host.verify([("<think>x</think><answer>y</answer>", "", {}), ("<think>" * 140_000, "", {})])
        assert [v.status for v in host.check_golds(["", "x"])] == ["correct", "correct"]
    assert (good.score, bad.score, bad.status) == (1.0, 0.0, "incorrect")
    assert bad.info["reason"] == bad.info["failed"][0]


def test_picklable():
    verifier = pickle.loads(pickle.dumps(load_verifier(VerifierSpec("format", {"box": True}))))
    assert verifier.verify(r"\boxed{1}", "", meta={}).score == 1.0
