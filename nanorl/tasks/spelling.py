"""Spelling: `How many r are in strawberry?` -> `#3`, at once or spelled out and counted along.

A model sees a word as one or a few tokens. To count its letters it must know how they are spelled.
"""

import codecs
import os
import string
from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import is_close, number_after
from nanorl.tasks.counting import count_along
from nanorl.tasks.files import decode, open_bytes
from nanorl.tasks.problem import (
    REWARDS,
    STYLES,
    Problem,
    check_split,
    content_hash,
    in_split,
    judged,
    one_of,
    shows_working,
)

MARKER = "#"
MOST_WORDS = 20_000  # the first of the file, which are the most frequent


@lru_cache
def _problems(split, path):
    """The split's (word, letter) pairs, in a fixed random order.

    The word decides the split, so no word that is trained on is validated on. path: the file of
    words; None for the built-in list.
    """
    words = _read_words(path) if path else BUILT_IN.split()
    hashes = np.array([content_hash(word) for word in words], np.uint64)
    pairs = []
    for word, in_this_split in zip(words, in_split(hashes, split)):
        if in_this_split:
            pairs += [(word, letter) for letter in _letters_asked(word)]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in order]


def _read_words(path):
    """A file -> its first MOST_WORDS words of 3 to 14 plain letters, in lower case, none twice."""
    with open_bytes(path) as f:
        all_words = decode(f.read().removeprefix(codecs.BOM_UTF8), path).split()
    words = {}  # a dict keeps their order
    for word in all_words:
        if 3 <= len(word) <= 14 and word.isascii() and word.isalpha():
            words[word.lower()] = None
    return list(words)[:MOST_WORDS]


def _letters_asked(word):
    """The letters whose number is asked: 'apple' -> one that it has not, one it has once, and 'p'.

    The last are all that it repeats. So no one answer is right most of the time.
    """
    alphabet = string.ascii_lowercase
    asked = []
    for count in (0, 1):
        # One of the letters that the word has so often. A hash picks it.
        letters = [letter for letter in alphabet if word.count(letter) == count]
        if letters:
            asked.append(letters[content_hash(f"{word} {count}") % len(letters)])
    return asked + [letter for letter in alphabet if word.count(letter) > 1]


class Spelling:
    """demonstrations: direct, worked or mixed. rewards: binary or signed.

    The words come from NANORL_DATA/words.txt, one a line, the most frequent first. Without that
    file they come from a short built-in list.
    """

    marker = MARKER  # what templates.py needs

    def __init__(self, split="train", demonstrations="mixed", rewards="binary"):
        check_split(split)
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, REWARDS)
        root = os.path.expanduser(os.environ.get("NANORL_DATA", ""))
        path = os.path.join(root, "words.txt") if root else None
        if path and not os.path.exists(path):
            path = None
        self.pairs = _problems(split, path)
        self.demonstrations = demonstrations
        self.rewards = rewards

    def __len__(self):
        return len(self.pairs)

    def problem(self, index):
        word, letter = self.pairs[index]
        prompt = [{"role": "user", "content": f"How many {letter} are in {word}?"}]
        answer = str(word.count(letter))
        return Problem(prompt, answer, {"word": word, "letter": letter})

    def solution(self, problem):
        worked = ""
        if shows_working(self.demonstrations, problem):
            worked = count_along(problem.meta["word"], problem.meta["letter"])
        return worked + MARKER + problem.answer

    def document(self, index):
        """Six words, spelled."""
        lines = []
        for k in range(6):
            word, _ = self.pairs[(6 * index + k) % len(self)]
            lines.append(f"{word}: {' '.join(word)}")
        return "\n".join(lines)

    def reward(self, problem, completion):
        value = number_after(completion, MARKER)
        correct = is_close(value, problem.answer)
        has_marker = MARKER in completion
        return judged(correct, self.rewards, format=has_marker, answered=value is not None)


BUILT_IN = """
about above accept across action active address advance advice afford afraid after again against
agree airport alive allow almost alone along already also always amount ancient anger animal
answer anxious anyone appear apple april arrive artist asleep attack august autumn avoid awake
away baby back bacon badge bake balance ball banana band bank barn basket bath battle beach bean
bear beauty become bedroom beetle before begin behave behind believe belong below bench berry
beside better between beyond bicycle bigger bird birthday biscuit bitter black blanket blind
blood blossom blue board boat body bone book border borrow bottle bottom bowl branch brave bread
break breakfast breath brick bridge bright bring broken brother brown brush bubble bucket build
bullet burn bush business butter button cabbage cabin cable cake call camera camp canal candle
cannon canvas captain carbon card care carpet carrot carry castle cattle cause ceiling cellar
center century certain chain chair chance change chapter charge cheap check cheek cheese cherry
chest chicken chief child chimney choose church circle citizen city class clean clear clever
climb clock close cloth cloud clover coach coast coffee cold collar collect college color column
comfort common company compare concert cook copper copy corner correct cotton cough council
count country couple courage course cousin cover cradle cream credit cricket crime crop cross
crowd crown cruel cry cucumber culture cup curtain curve custom damage dance danger dark
daughter decade december decide deep defend degree delay deliver demand depend desert desire
detail develop diamond dinner direct dirty discover dish distance divide doctor dollar donkey
door double doubt down dragon drawer dream dress drink drive drop dry dull during dust duty
eager eagle early earn earth east easy edge effect effort eight either elbow eleven empty enemy
energy engine enjoy enough enter equal error escape evening event every exact example except
exchange excuse exercise expect explain extra eyebrow fabric factory fail fair faith family
famous farmer father fault favor feather february feeling fellow fence fever field fifteen fight
figure finger finish fire fish flag flame flavor flight float floor flower follow foot forest
forget forgive fork formal fortune forty forward fountain fox frame free freeze fresh friday
friend frog front frost fruit funny furniture future gallery game garden garlic gate gather
general gentle giant ginger giraffe girl glad glass glove goal goat gold goose govern grade
grain grammar grand grape grass gray great green ground group grow guard guess guest guide
guitar habit hair half hammer hand happen happy harbor hard harvest hat hate hay head health
heart heat heavy height hello helmet help herring hidden highway hill history hobby hole holiday
hollow honest honey hope horse hospital hotel hour house human humble hundred hunger hurry
husband ice idea imagine improve inch include income indeed industry injury insect inside
instead interest invite iron island jacket january jealous jelly jewel join joke journey judge
juice july jump june jungle justice kettle keyboard kick kidney kind king kitchen kite kitten
knee knife knock know ladder lady lake lamb lamp language laptop large later laugh lawyer layer
lazy leader leaf learn leather leave lecture left legend lemon length lesson letter lettuce
level library light limit linen lion listen little liver living lizard local lobster lonely long
loose lorry loud love lovely lower lucky lunch machine magic major manage manner marble march
market marriage master match matter mayor meadow meal measure meat medal medicine meeting melon
member memory mention mercy metal method middle midnight mild milk million mineral minute mirror
missing mistake mixture modern moment monday money monkey month moon morning mother motor
mountain mouse mouth move muffin muscle museum music mustard mutual mystery nail narrow nation
native nature near neck needle neighbor nephew nerve nest never news night nine noble noise none
noodle normal north nose nothing notice novel november number nurse object ocean october offer
office often olive onion open opinion orange orchard order organ other otter outside oven over
owner oyster packet paddle page pain paint palace paper parcel parent parrot party passage
passenger past patient pattern pause peace peach peanut pear pebble pencil people pepper perfect
perhaps permit person picnic picture piece pigeon pillow pilot pirate place plain planet plant
plastic plate please plenty pocket poem poet point poison police polite pond poor popular
possible postcard potato pottery powder power praise pray prefer prepare present pretty prevent
price pride priest prince print prison private prize problem produce promise proper protect
proud prove public pudding pull pumpkin punish pupil puppy purple purpose purse push puzzle
quality quarter queen question quick quiet quilt rabbit radio railway rain raise rapid rare
raspberry rather razor reach ready really reason receive recent record red reduce refuse regret
regular relax remain remember remind remove repair repeat reply report rescue respect rest
result return reward ribbon rice rich ride right ring river road roast robin rocket roof room
root rope rose rough round royal rubber rude ruin rule runner sad saddle safe sailor salad
salmon salt same sand sandwich saturday sauce sausage save scale scarf scatter school science
scissors score scratch scream screen sea search season seat second secret seed select sell send
sense sentence separate september series serious servant settle seven several shade shadow shake
shallow shame shape share sharp sheep sheet shelf shell shelter shine ship shirt shoe shop short
shoulder shout shovel show shower sick side sight signal silence silk silly silver similar
simple since singer single sister situation sixteen size skill skin skirt sky sleep sleeve slice
slide slip slow small smart smell smile smoke smooth snail snake snow soap soccer social soft
soldier solid some son song soon sorrow sorry soul sound soup south space spade spare sparrow
speak special speech speed spell spend spider spinach spirit spoon sport spread spring square
squirrel stable staff stage stair stamp stand star start state station steady steam steel step
stick still stomach stone stop store storm story stove strange strawberry stream street strong
student study stupid subject succeed sudden suffer sugar suggest suit summer sunday sunny supper
supply support sure surface surprise swallow swan sweater sweet swim sword system table tailor
take tall taste teacher team tear telephone tell temper temple ten tennis tent terrible thank
theater thick thief thing thirsty thirteen thousand thread threat throat through throw thumb
thunder thursday ticket tidy tiger timber time tiny tired title toast tobacco today together
toilet tomato tomorrow tongue tonight tooth total touch toward towel tower town trade traffic
train travel treasure treat tree trial tribe trick trouble trousers truck true trumpet trunk
trust truth try tube tuesday tunnel turkey turn turtle twelve twenty twist type ugly uncle under
uniform union unit until upper upset urgent use useful usual valley value vanilla various vase
vegetable vehicle very vessel victory view village vinegar violet violin visit voice volume vote
voyage wagon waist wait walk wall wallet walnut wander want war warm warning wash waste watch
water wave wealth weapon weather wedding wednesday week weigh welcome west wet whale wheat wheel
where whisper whistle white whole wide wife wild will willow wind window wine wing winner winter
wise wish wolf woman wonder wood wool word work world worry worth wound wrist write wrong yard
year yellow yesterday yogurt young zebra zero
"""
