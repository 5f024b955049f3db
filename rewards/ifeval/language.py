"""Which of the languages that IFEval asks for a text is in: by its script, then by the commonest words of each.

No statistical model: a language with a script of its own is told by its letters alone; those that share a script by
function words and letters that the others lack. A text without any such word is of no language that shares a script.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

SCRIPTS = {
    "LATIN": {
        "en": "the and of to is in that it was for with you are this be have not on as at by from or an they we his",
        "de": "der die und das ist ein eine nicht ich zu den von mit es sie auf für dem im auch sich wie aber wenn wir",
        "fr": "le les et des est une un du dans que qui pour pas sur avec il elle nous vous ce cette au mais plus sont",
        "es": "el los las y una un del que en es por con para no su se lo como más pero está muy son al mi yo tu este",
        "pt": "o os as um uma do da dos das que em é por com para não seu sua se mais mas como ao na no são está muito",
        "it": "il gli una un di che è per con non sono della del nel alla si più ma come anche le lo questo questa ha",
        "pl": "w na i się nie do to jest że z o jak ale po co tak za od przez dla są czy był jego być który tylko już",
        "fi": "ja on ei se että oli hän mutta kun niin ovat joka myös tai sen minä olen ole mitä kuin jos hänen siitä",
        "sw": "na ya wa kwa ni katika la za kuwa hii huyo yake cha hiyo alikuwa lakini sana kama kila yangu mimi wewe",
        "vi": "và là của có không được cho người trong một những với các này đã tôi bạn để khi thì mà rất nhiều đó như",
    },
    "CYRILLIC": {
        "ru": "и в не на что он я с как это она но они мы все ты вы был для его от по из так же у бы только если",
        "bg": "и в не на да се е от за са че с по като това ще но си ли във те ние аз беше който може има до",
        "uk": "і в не на що він я з як це вона але вони ми всі ти ви був для його від по із так же у й та є до чи",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا هذه التي الذي لا ما هو هي كان عن مع كل أو ثم قد لم إن بعد و يا هل أنا نحن",
        "fa": "و در به از که این را است با برای آن یک خود تا بر هم نیز می شود ما من شما است، اما یا هر بود های",
        "ur": "کے کی ہے میں سے کا کو اور نے یہ پر ہیں کہ ایک وہ بھی تھا تو کر ہو نہیں ہم آپ لئے گیا جو اس ان",
    },
    "DEVANAGARI": {
        "hi": "है के की में का को से और हैं पर यह ने एक कि भी नहीं तो हो था इस वह मैं जो लिए कर या अपने हम आप थी",
        "mr": "आहे आणि च्या मध्ये तो ती ते हे हा ही आहेत नाही मी आपण एक पण होते होता होती या त्या करण्यासाठी साठी काय",
        "ne": "छ र को मा छन् यो हो ले लाई गर्न पनि एक भएको छैन म तपाईं हामी तर थियो गर्ने भने हुन्छ का की के हुन् त्यो",
    },
}
OWN_SCRIPT = {
    "KANNADA": "kn",
    "GURMUKHI": "pa",
    "GUJARATI": "gu",
    "TELUGU": "te",
    "TAMIL": "ta",
    "MALAYALAM": "ml",
    "BENGALI": "bn",
    "THAI": "th",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HEBREW": "he",
    "CJK": "zh",
}
# Letters that none of the other languages of the script writes; each letter found counts as a word.
LETTERS = {
    "de": "ßäöü",
    "es": "ñ¿¡",
    "pt": "ãõ",
    "fr": "œêèçà",
    "pl": "ąęłńśźż",
    "vi": "ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "ru": "ыэё",
    "uk": "іїєґ",
    "fa": "پژی",
    "ur": "ٹڈڑںےہ",
    "ar": "ةىيكإأ",
    "mr": "ळ",
}
LANGUAGES = frozenset(OWN_SCRIPT.values()) | {code for profiles in SCRIPTS.values() for code in profiles}
PROFILES = {code: frozenset(words.split()) for profiles in SCRIPTS.values() for code, words in profiles.items()}
WORD = re.compile(r"[^\W\d_]+(?:[\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0962\u0963]+[^\W\d_]*)*")


def is_language(text: str, code: str) -> bool:
    """Whether more than half of the text's letters are of the language's script, and no other of it fits better.

    Raises KeyError for a language that is not in LANGUAGES.
    """
    if code not in LANGUAGES:
        raise KeyError(code)
    return language(text) == code


def language(text: str) -> str | None:
    """The code of the text's language, None where it cannot be told."""
    scripts = Counter(script for script in map(script_of, text.casefold()) if script)
    if scripts["HIRAGANA"] + scripts["KATAKANA"]:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0) + scripts.pop("KATAKANA", 0)
    if not scripts:
        return None
    script, letters = scripts.most_common(1)[0]
    if letters * 2 <= scripts.total():
        return None
    if script in OWN_SCRIPT:
        return OWN_SCRIPT[script]
    return likeliest(text.casefold(), tuple(SCRIPTS.get(script, ())))


def likeliest(text: str, codes: tuple[str, ...]) -> str | None:
    """The language with the most of its commonest words and own letters in the text; None without any, or with two."""
    words = Counter(WORD.findall(text))
    letters = Counter(text)
    hits = Counter(
        {
            code: sum(words[word] for word in PROFILES[code]) + sum(letters[letter] for letter in LETTERS.get(code, ""))
            for code in codes
        }
    ).most_common(2)
    if not hits or hits[0][1] == 0 or (len(hits) > 1 and hits[0][1] == hits[1][1]):
        return None
    return hits[0][0]


@lru_cache(maxsize=1 << 12)
def script_of(letter: str) -> str | None:
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else None
