"""Write ``catalogue.json`` from Unicode's ``emoji-test.txt`` and the folder of pictures.

    python -m trainers.nano.build_catalogue --names emoji-test.txt --files FOLDER

Needed only to change the catalogue; the result is committed. Names and groups come from Unicode; the tables below add
which subgroups are objects, what a person already wears or holds, and which pictures contain scenery.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
GENDER_SIGN = re.compile(r"-200d-(2642|2640)$")
SPLIT_SEED = "unipic-1"
HELDOUT_SHARE = {"person": 0.13, "object": 0.17}

PERSON_GROUPS = (
    "person",
    "person-gesture",
    "person-role",
    "person-fantasy",
    "person-activity",
    "person-sport",
    "person-resting",
)
OBJECT_GROUPS = _keys("""animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug
    plant-flower plant-other food-fruit food-vegetable food-prepared food-asian food-marine food-sweet drink
    dishware place-building place-religious transport-ground transport-water transport-air hotel event award-medal
    sport game music musical-instrument clothing phone computer light_video book-paper money mail writing office
    lock tool science medical household other-object face-costume""")
# Single things from subgroups that are otherwise signs or scenery.
EXTRA_OBJECTS = _keys("""231b 23f3 231a 23f0 23f1 23f2 1f570 1f302 2602 2603 26c4 1f321 1fa90 2b50 1f3ad 1f5bc 1f3a8
    1f9f5 1f9f6 1f514 1f4e2 1f4e3 1f4ef 1f9b4 1f9be 1f9bf 1f9b7 1f3a0 26f2 26fa 1f3aa 1f488 1f9ed 1f30d 1f531 1f3f4
    1f3c1 1f6a9 1f6e1 1f9f1 1faa8 1fab5""")
# Signs, scenery, duplicates of a neighbour, and things too thin or too pale to be told apart at 128 pixels.
EXCLUDED = _keys("""1f43d 1f43e 1fab6 1fabd 1f578 1f9a0 1f4ae 1f3f5 1f343 1f7e0 1f5fb 1f3d7 1f3d8 1f3e2 1f3e3 1f3e4
    1f3e5 1f3e6 1f3e8 1f3e9 1f3ea 1f3eb 1f3ec 1f3ed 1f3da 1f54b 26e9 1f68f 1f6e3 1f6e4 1f6a5 1f6a7 1f687 1f689 1f69e
    1f69f 1f6a0 1f6a1 1f6eb 1f6ec 1f386 1f387 2728 1f391 1f39f 1f3ab 1f397 1f38a 1f0cf 1f004 1f3b4 2660 2665 2666
    2663 1f3b5 1f3b6 1f3bc 1f39a 1f4f2 1f39e 1f4c3 1f4c4 1f4d1 1f3f7 1f4b9 1f4b4 1f4b5 1f4b6 1f4b7 1f4b8 1f9fe 1f4e7
    1f4e8 1f4e9 1f4e4 1f4e5 1f4ea 1f4ec 1f4ed 1f5c2 1f4c6 1f5d3 1f4c7 1f4c8 1f4c9 1f4ca 1f587 1f50f 1f510 1f517 26d3
    1f9ec 1fa78 1fa7b 1f6d7 1f6bf 1fae7 1fad7 1f9ca 1faaa 1f4a9 1f47e 1f9af 1faa1 1f945 26f3 2712 1f5f3 1f516""")
RENAMED = {
    "1f452": "sun hat", "1f393": "graduation cap", "1f9e2": "baseball cap", "26d1": "rescue helmet",
    "1f45e": "brown shoe", "1f45a": "pink blouse", "1f461": "sandal", "1f462": "boot", "1f9e7": "red envelope",
    "1f3b9": "piano keyboard", "1f3be": "tennis racket", "1f3f8": "badminton racket", "1f3d3": "ping pong paddle",
    "1f3cf": "cricket bat", "1f3d1": "hockey stick", "1f3d2": "ice hockey stick", "1f94d": "lacrosse stick",
    "1f3b3": "bowling ball", "1f56f": "candle", "1f30d": "globe", "1f6cb": "couch", "1f5bc": "framed picture",
    "1f3ad": "theatre masks", "1f50d": "magnifying glass", "1f50e": "magnifying lens", "1f4f8": "flash camera",
    "1f37d": "plate", "231b": "hourglass", "23f3": "running hourglass", "1f956": "baguette", "1f3a7": "headphones",
    "1f9f5": "spool of thread", "1f3b2": "die", "1f4d4": "decorated notebook", "1f4eb": "mailbox",
    "1f963": "bowl with a spoon", "1f6a8": "siren", "1f3a3": "fishing rod", "1f697": "car", "1f699": "jeep",
    "1f69b": "lorry", "1f698": "oncoming car", "26c4": "small snowman", "2602": "umbrella", "1f34a": "orange fruit",
    "1f347": "bunch of grapes", "1f33d": "corn cob", "1f949": "bronze medal", "1f948": "silver medal",
    "1f947": "gold medal", "1f4da": "pile of books", "1f492": "wedding chapel", "1faae": "hair comb",
    "1f377": "glass of wine", "2615": "cup of coffee", "1f375": "cup of tea", "1f943": "glass of whisky",
    "1f942": "two champagne glasses", "1f37b": "two beer mugs", "1f6d2": "shopping cart",
    "1f426-200d-2b1b": "black bird", "1f43b-200d-2744": "polar bear", "1f996": "tyrannosaur", "1f531": "trident",
    "1f3c1": "chequered flag", "1f4e1": "satellite dish", "1f9fb": "roll of paper", "1f9d1-200d-1f384": "Claus",
    "1f931": "breastfeeding woman", "1f3c7": "jockey on a horse", "1f9af": "white cane", "1f478": "princess",
    "1f6c0": "person taking a bath", "1f574": "levitating man in a suit", "1f47c": "baby angel",
    "1f3b1": "billiard ball",
}  # fmt: skip
# Groups of pictures that differ in a detail only; a twin of a held-out picture must not be trained on.
TWINS = """1f34e 1f34f|26be 1f94e|1f40f 1f411|1f402 1f403|1f42a 1f42b|1f401 1f400|1f424 1f425|231b 23f3|1f512 1f513|
    1f50d 1f50e|1f4f7 1f4f8|2603 26c4|1f68c 1f68d 1f68e|1f693 1f694|1f695 1f696|1f697 1f698|1f408 1f408-200d-2b1b|
    1f415 1f9ae|1f947 1f948 1f949 1f3c5|1f4d5 1f4d7 1f4d8 1f4d9|1f684 1f685|1f43b 1f43b-200d-2744|1f4bf 1f4c0|
    1f450 1f455|1f50b 1faab|1f508 1f507|1f30d 1f30e|1f68b 1f68a|1f426 1f426-200d-2b1b|1f3be 1f3f8"""
HATS = {"1f451", "1f452", "1f3a9", "1f393", "1f9e2", "1fa96", "26d1"}
# The pictures of the README and of the tests.
DEMO_HELDOUT = {"1f3b8", "1f9e2", "1f9d1-200d-1f680", "1f3a9", "1f9b8", "1f43c", "1f355", "1f6f5"}

HEADS = {"1f473", "1f47c", "1f385", "1f936", "x-200d-1f384"}
SCENERY = _keys("""1f9cf 1f9d6 1f9d7 1f3c2 1f3c4 1f6a3 1f3ca 1f6b5 1f93d 1f6c0 1f6cc 1f486 1f487 1f647 1f93c
    1f46f""")
FULL = _keys("""1f9da 1f9dc 1f6b6 1f9cd x-200d-1f9af 1f3c3 1f483 1f57a 1f574 1f93a 1f3c7 26f7 1f3cc 26f9 1f3cb 1f6b4
    1f938 1f93e""")
SEATED = _keys("1f9ce x-200d-1f9bc x-200d-1f9bd 1f9d8")
PROPS = _keys("""x-200d-1f3eb x-200d-2696 x-200d-1f33e x-200d-1f373 x-200d-1f527 x-200d-1f3ed x-200d-1f52c
    x-200d-1f4bb x-200d-1f3a4 x-200d-1f3a8 x-200d-1f692 1f575 1f470 1f931 x-200d-1f37c 1f9d9 1f9da 1f9dc 1f9cc
    x-200d-1f9af x-200d-1f9bc x-200d-1f9bd 1f93a 1f3c7 26f7 1f3cc 26f9 1f3cb 1f6b4 1f93e 1f939""")
# Something is on the head already, or (the teacher before a blackboard) the outline does not show where the head is.
COVERED = _keys("""x-200d-1f3eb x-200d-1f393 x-200d-1f33e x-200d-1f373 x-200d-1f527 x-200d-1f3ed x-200d-1f3a8
    x-200d-2708 x-200d-1f680 x-200d-1f692 1f46e 1f575 1f482 1f977 1f477 1fac5 1f934 1f478 1f473 1f472 1f9d5 1f470
    1f47c 1f385 1f936 x-200d-1f384 1f9d9 1f9dd 1f9de 1f9cc 1f939 26f7 1f6b4 1f3c7 1f93a 1f574""")
# Arms that are raised, crossed or in front of the face: neither a hat nor a held thing would look right.
BUSY_ARMS = _keys("1f64e 1f645 1f646 1f481 1f64b 1f926 1f937 1f930 1fac3 1fac4 1f9df")
ARMS_OVER_HEAD = _keys("1f645 1f646 1f64b 1f926 1f937")


@dataclass(frozen=True)
class Entry:
    """One line of Unicode's table: code points without fe0f, spoken name, subgroup."""

    key: str
    name: str
    group: str


def read_names(path: Path) -> list[Entry]:
    """The table's lines in order, each key once."""
    entries: dict[str, Entry] = {}
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            group = line.split(":", 1)[1].strip().replace(" & ", "_")
        elif ";" in line and not line.startswith("#"):
            key = "-".join(point.lower() for point in line.split(";")[0].split() if point != "FE0F")
            name = re.search(r"# \S+ E\S+ (.*)", line)
            if name and key not in entries:
                entries[key] = Entry(key, name.group(1), group)
    return list(entries.values())


def family_of(design: str) -> str:
    """The design without its gender: ``x-200d-1f680`` for the three astronauts, ``1f9dd`` for the three elves."""
    design = GENDER_SIGN.sub("", design)
    head, _, rest = design.partition("-200d-")
    return f"x-200d-{rest}" if rest and head in {"1f9d1", "1f468", "1f469"} else design


def gender_of(entry: Entry) -> str | None:
    """Gender by the code points, else by the name; None if neither states it."""
    words = set(re.findall(r"[a-z]+", entry.name.lower()))
    if {"1f469", "2640"} & set(entry.key.split("-")) or words & {"woman", "girl", "mermaid", "princess", "mrs"}:
        return "woman"
    if {"1f468", "2642"} & set(entry.key.split("-")) or words & {"man", "boy", "merman", "prince", "santa"}:
        return "man"
    return None


def spoken_name(entry: Entry) -> str:
    """Short natural name: 'man: red hair' becomes 'red-haired man'."""
    if entry.key in RENAMED:
        return RENAMED[entry.key]
    name = entry.name.replace("’", "'").replace("getting ", "getting a ").replace("mx claus", "Claus")
    who, colon, trait = name.partition(": ")
    if colon:
        adjective = {"bald": "bald", "beard": "bearded"}.get(trait, trait.replace(" hair", "-haired"))
        return f"{adjective} {who}"
    return name if name.startswith(("Santa", "Mrs")) else name.lower()


def pose_of(entry: Entry, family: str) -> str:
    if family in SCENERY:
        return "scenery"
    if entry.group == "person" or family in HEADS:
        return "head"
    if family in FULL:
        return "full"
    return "seated" if family in SEATED else "bust"


def heldout(family: str, kind: str) -> bool:
    """True for held-out families, by a seeded hash, so that new pictures never move old ones to the other split."""
    digest = hashlib.sha256(f"{SPLIT_SEED}:{family}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELDOUT_SHARE[kind]


def twin_families() -> dict[str, str]:
    groups = [pair.split() for pair in TWINS.split("|")]
    return {key: group[0] for group in groups for key in group}


def person_row(entry: Entry, has_tones: bool) -> dict[str, object]:
    family = family_of(entry.key)
    pose = pose_of(entry, family)
    holds = family in PROPS
    covered = family in COVERED
    arms_free = pose == "bust" and not holds and family not in BUSY_ARMS
    return {
        "key": entry.key,
        "name": spoken_name(entry),
        "kind": "person",
        "category": entry.group,
        "family": family,
        "gender": gender_of(entry),
        "pose": pose,
        "tones": has_tones,
        "holds_prop": holds,
        "can_hold": arms_free,
        "can_wear": pose in {"head", "bust"} and not covered and family not in ARMS_OVER_HEAD,
    }


def object_row(entry: Entry, twins: dict[str, str]) -> dict[str, object]:
    category = "hat" if entry.key in HATS else entry.group
    return {
        "key": entry.key,
        "name": spoken_name(entry),
        "kind": "object",
        "category": category,
        "family": twins.get(entry.key, entry.key),
    }


def build(entries: list[Entry], available: set[str]) -> list[dict[str, object]]:
    """Build the rows of all usable designs, persons first, with the split of their family."""
    twins = twin_families()
    rows = []
    for entry in entries:
        if entry.key not in available or set(entry.key.split("-")) & set(TONES):
            continue
        if entry.group in PERSON_GROUPS:
            first, _, rest = entry.key.partition("-")
            rows.append(person_row(entry, "-".join(filter(None, (first, "1f3fb", rest))) in available))
        elif (entry.group in OBJECT_GROUPS or entry.key in EXTRA_OBJECTS) and entry.key not in EXCLUDED:
            rows.append(object_row(entry, twins))
    demo = {str(row["family"]) for row in rows if row["key"] in DEMO_HELDOUT}
    for row in rows:
        family, kind = str(row["family"]), str(row["kind"])
        by_hash = row["category"] != "hat" and heldout(family, kind)  # seven hats are too few to draw from
        row["split"] = "heldout" if family in demo or by_hash else "train"
    return sorted(rows, key=lambda row: row["kind"] == "object")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="Unicode's emoji-test.txt")
    parser.add_argument("--files", type=Path, required=True, help="folder of <code points>.webp")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("catalogue.json"))
    options = parser.parse_args()
    available = {path.stem.replace("-fe0f", "") for path in options.files.glob("*.webp")}
    rows = build(read_names(options.names), available)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    options.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(rows)} designs written to {options.out}")


if __name__ == "__main__":
    main()
