"""The verifier `ifeval`: each instruction on a published prompt, with responses that follow it and that do not."""

import json
from pathlib import Path

import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec, load_verifier
from deltarl.rewards.ifeval import IfevalVerifier
from deltarl.rewards.ifeval.instructions import INSTRUCTIONS, sentences
from deltarl.rewards.ifeval.language import LANGUAGES, language

CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "ifeval_cases.jsonl").read_text().splitlines()]
LANGUAGE_SAMPLES = {
    "en": "The cat is on the roof and it will not come down.",
    "de": "Die Katze sitzt auf dem Dach und will nicht herunterkommen.",
    "fr": "Le chat est sur le toit et il ne veut pas descendre avec nous.",
    "es": "El gato está en el tejado y no quiere bajar con los niños.",
    "pt": "O gato está no telhado e não quer descer com as crianças.",
    "it": "Il gatto è sul tetto e non vuole scendere con i bambini della scuola.",
    "pl": "Kot siedzi na dachu i nie chce się z niego ruszyć.",
    "fi": "Kissa on katolla ja se ei halua tulla alas, mutta hän odottaa.",
    "sw": "Paka yuko juu ya paa na hataki kushuka kwa sababu ya mvua.",
    "vi": "Con mèo ở trên mái nhà và không muốn xuống với các bạn.",
    "ru": "Кошка сидит на крыше, и она не хочет спускаться, потому что это высоко.",
    "bg": "Котката е на покрива и не иска да слезе, защото е високо.",
    "uk": "Кішка сидить на даху і не хоче злазити, бо це високо.",
    "ar": "القطة على السطح ولا تريد أن تنزل إلى الأرض.",
    "fa": "گربه روی بام است و نمی خواهد که از آن پایین بیاید.",
    "ur": "بلی چھت پر ہے اور وہ نیچے نہیں آنا چاہتی۔",
    "hi": "बिल्ली छत पर है और वह नीचे नहीं आना चाहती है।",
    "mr": "मांजर छतावर आहे आणि ती खाली येत नाही.",
    "ne": "बिरालो छतमा छ र त्यो तल आउन चाहँदैन।",
    "kn": "ಬೆಕ್ಕು ಛಾವಣಿಯ ಮೇಲಿದೆ.",
    "pa": "ਬਿੱਲੀ ਛੱਤ ਉੱਤੇ ਹੈ।",
    "gu": "બિલાડી છત પર છે.",
    "te": "పిల్లి పైకప్పు మీద ఉంది.",
    "ta": "பூனை கூரையின் மீது உள்ளது.",
    "ml": "പൂച്ച മേൽക്കൂരയിലാണ്.",
    "bn": "বিড়ালটি ছাদে আছে।",
    "th": "แมวอยู่บนหลังคา",
    "ko": "고양이가 지붕 위에 있습니다.",
    "ja": "猫は屋根の上にいます。",
    "he": "החתול על הגג.",
    "zh": "猫在屋顶上。",
}


def gold(*steps):
    return json.dumps({"instruction_id_list": [name for name, _ in steps], "kwargs": [kwargs for _, kwargs in steps]})


COMMAS = ("punctuation:no_comma", {})
QUOTED = ("startend:quotation", {})
BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})


def test_the_cases_cover_every_instruction_both_ways():
    assert {case["instruction_id_list"][0] for case in CASES} == set(INSTRUCTIONS) and len(INSTRUCTIONS) == 25
    assert all(case["passing"] and case["failing"] for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["instruction_id_list"][0])
def test_each_instruction(case):
    strict, loose = IfevalVerifier(), IfevalVerifier(mode="loose")
    for response in case["passing"]:
        assert strict.verify(response, json.dumps(case), meta={}).status == "correct", response
        assert loose.verify(response, "", meta=case).score == 1.0, response
    for response in case["failing"]:
        verdict = strict.verify(response, json.dumps(case), meta={})
        assert (verdict.status, verdict.score) == ("incorrect", 0.0), response
        assert verdict.info["reason"] == f"not followed: {case['instruction_id_list'][0]}"


def test_loose_forgives_a_first_line_a_last_line_and_asterisks():
    loose, strict = IfevalVerifier(mode="loose"), IfevalVerifier()
    for response in ('Sure, here it is:\n"Yes"', '"Yes"\nHope, that helps', 'Well,\n"Yes"\nBye', '**"Yes"**'):
        assert loose.verify(response, gold(QUOTED), meta={}).score == 1.0
        assert strict.verify(response, gold(QUOTED), meta={}).score == 0.0
    assert loose.verify('a\nb\n"Yes"', gold(QUOTED), meta={}).score == 0.0


def test_scores_of_several_instructions():
    response, several = '"No commas"', gold(COMMAS, QUOTED, BULLETS)
    assert IfevalVerifier().verify(response, several, meta={}).score == 0.0
    verdict = IfevalVerifier(score="share").verify(response, several, meta={})
    assert verdict.score == pytest.approx(2 / 3) and verdict.status == "incorrect"
    assert verdict.info["followed"] == [True, True, False]
    assert IfevalVerifier().verify(" \n", several, meta={}).status == "no_answer"
    assert IfevalVerifier().verify("<think>a, b", several, meta={}).status == "no_answer"
    assert IfevalVerifier().verify("<think>a, b</think>\n'c'", gold(COMMAS), meta={}).extracted == "'c'"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (gold(("startend:quotations", {})), "unknown instruction 'startend:quotations': did you mean"),
        (gold(("startend:end_checker", {})), "lacks its argument end_phrase"),
        (gold(("startend:end_checker", {"end_phrase": None})), "lacks its argument end_phrase"),
        (gold(("startend:quotation", {"mark": "'"})), "has no argument 'mark': it takes none"),
        (gold(("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "more"})), "relation='more'"),
        (gold(("language:response_language", {"language": "tlh"})), "language='tlh'"),
        (gold(("length_constraints:number_paragraphs", {"num_paragraphs": "2"})), "num_paragraphs='2'"),
        (json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}), "one object for each of the 1"),
        ("", "no instruction_id_list"),
    ],
)  # fmt: skip
def test_golds_that_cannot_be_checked(bad, reason):
    verdict = IfevalVerifier().verify("x", bad, meta={})
    assert verdict.status == "gold_error" and reason in verdict.info["reason"] and "\n" not in verdict.info["reason"]
    assert IfevalVerifier().check_gold(bad) == (verdict.info["reason"] if bad else None)


def test_arguments_of_null_are_left_out():
    steps = gold(("punctuation:no_comma", {"num_bullets": None}), ("startend:quotation", None))
    assert IfevalVerifier().verify('"x"', steps, meta={}).score == 1.0


@pytest.mark.parametrize("code", LANGUAGE_SAMPLES)
def test_languages(code):
    assert language(LANGUAGE_SAMPLES[code]) == code
    assert language(f"{LANGUAGE_SAMPLES[code]} \U0001f600 42!") == code


def test_languages_cover_the_prompts_and_say_when_they_cannot_tell():
    assert set(LANGUAGE_SAMPLES) == LANGUAGES
    assert [language(text) for text in ("", "42!", "Xyzzy qwrt", "кот kot", "a\u0301")] == [None] * 5


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Dr. A. B. Smith paid $3.50, i.e. too much, at 5 p.m. today.", 1),
        ("He said \"Go.\" Then he left.", 2),
        ("Wait... What?!", 2),
        ("1. First.\n2. Second.", 2),
        ("no stop at all", 1),
        ("He came at last, etc. She left.", 2),
        ("यह एक है। यह दो है।", 2),
        ("一。二。", 2),
        ("...", 0),
    ],
)  # fmt: skip
def test_sentences(text, count):
    assert sentences(text) == count


REPEATED = [
    "a",
    "*",
    "[",
    "<<",
    ". ",
    "-\n",
    "\n",
    "1.\n",
    "***",
    "SECTION ",
    "p. ",
    " ",
    "x.\t",
    "mr. ",
    "**a",
    "``` ",
]


def test_long_responses_are_checked_within_the_hosts_deadline():
    everything = json.dumps(
        {
            "instruction_id_list": [case["instruction_id_list"][0] for case in CASES],
            "kwargs": [case["kwargs"][0] for case in CASES],
        }
    )
    texts = [piece * (200_000 // len(piece)) + "x" for piece in REPEATED]
    with VerifierHost(VerifierSpec("ifeval", {"mode": "loose", "score": "share"}), timeout=30.0) as host:
        verdicts = host.verify([(text, everything, {}) for text in texts])
    assert [(v.status, len(v.info["followed"])) for v in verdicts] == [("incorrect", 25)] * len(texts)


@pytest.mark.parametrize("options", [{"mode": "lax"}, {"score": "some"}])
def test_bad_options(options):
    with pytest.raises(VerifierLoadError, match=r"rejects its options: ValueError: (mode|score) '") as caught:
        load_verifier(VerifierSpec("ifeval", options))
    assert "\n" not in str(caught.value)
