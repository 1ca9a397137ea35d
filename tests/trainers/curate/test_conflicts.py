"""The conflict matrix: the paper's cases, exactness against brute force, and files that are wrong."""

import itertools
from collections import Counter
from pathlib import Path

import pytest

import trainers.curate
from trainers.curate.__main__ import main
from trainers.curate.conflicts.matrix import conflict_matrix, draw_matrix, reachable_share
from trainers.curate.conflicts.rules import Rules, read_rules
from trainers.curate.conflicts.solve import solve
from trainers.curate.conflicts.wording import instruction
from trainers.curate.errors import CurateError

FOLDER = Path(trainers.curate.__file__).parent / "conflicts"


@pytest.fixture(scope="module")
def people() -> Rules:
    return read_rules(FOLDER / "people.yaml")


def test_two_pairs_of_footwear_need_two_persons(people):
    assert solve(people, ["person", "footwear", "footwear"]).broken == ("slot feet",)
    seats = solve(people, ["person", "footwear", "footwear", "person"]).seats
    assert {seats[1].person, seats[2].person} == {0, 3}


def test_two_instruments_are_never_in_the_same_hands(people):
    assert solve(people, ["person", "instrument", "instrument"]).broken == ("forbid instrument + instrument",)
    free = people.model_copy(update={"forbid": []})
    assert solve(free, ["person", "instrument", "instrument"]).broken == ("slots together",)
    assert solve(free, ["person", "person", "instrument", "instrument"]).possible


@pytest.mark.parametrize(
    ("categories", "broken"),
    [
        (["person", "hat", "hat"], "slot head"),
        (["person", "umbrella", "hat"], "forbid hat + umbrella"),
        (["person", "saddle"], "require saddle with horse"),
        (["horse", "horse"], "count horse 1"),
        (["person"] * 4, "persons_max 3"),
        (["hat"], "no person whose slots they could take"),
        (["background", "background"], "slot background"),
        (["person with prop", "umbrella"], "slot left hand"),
    ],
)
def test_rules_that_forbid_are_named(people, categories, broken):
    assert broken in solve(people, categories).broken


def test_a_mug_goes_to_the_table_when_the_hands_are_full(people):
    solution = solve(people, ["person", "instrument", "mug"])
    assert solution.seats[2].slots == ("surface",)
    hands = {solve(people, ["person", "mug"], turn).seats[1].slots for turn in range(3)}
    assert hands == {("left hand",), ("right hand",), ("surface",)}


def brute_force(rules: Rules, categories: list[str]) -> bool:
    """Every way of every source tried, without pruning."""
    persons = [i for i, name in enumerate(categories) if rules.categories[name].person]
    options = []
    for i, name in enumerate(categories):
        category = rules.categories[name]
        hosts = [i] if category.person else persons
        ways = []
        for way in category.ways:
            body = any(slot in rules.slots for slot in way)
            ways += [(way, host) for host in (hosts if body or category.person else [None])]
        options.append(ways)
    for choice in itertools.product(*options):
        used = Counter((None if s in rules.scene_slots else host, s) for way, host in choice for s in way)
        if all(n <= (rules.scene_slots[s] if host is None else rules.slots[s]) for (host, s), n in used.items()):
            return True
    return False


def test_the_search_is_exact(people):
    values = people.model_dump(exclude={"require", "forbid", "persons_max"})
    for category in values["categories"].values():
        category["count"] = None
    free = Rules.model_validate(values)
    names = ["person", "person with prop", "instrument", "mug", "umbrella", "footwear"]
    both = {True: 0, False: 0}
    for count in range(1, 7):
        for chosen in itertools.combinations_with_replacement(names, count):
            possible = solve(free, chosen).possible
            assert possible == brute_force(free, list(chosen)), chosen
            both[possible] += 1
    assert min(both.values()) > 100


def test_the_matrix_is_symmetric_and_names_its_reasons(people):
    matrix = conflict_matrix(people)
    assert all(matrix[a, b] == matrix[b, a] for a, b in matrix)
    assert matrix["umbrella", "hat"].startswith("forbid")
    assert matrix["instrument", "instrument"].startswith("forbid")
    assert matrix["footwear", "footwear"] == ""  # with two persons
    assert matrix["saddle", "mug"] == ""  # the horse comes along
    one = conflict_matrix(people.model_copy(update={"persons_max": 1}))
    assert one["footwear", "footwear"] == "slot feet"
    assert draw_matrix(people).width > 200


def test_a_starved_category_is_seen():
    rules = Rules.model_validate({"slots": {"head": 1}, "categories": {"hat": {"uses": ["head"]}}})
    assert reachable_share(rules, 2, draws=10) == {"hat": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slots: {head: 1}\ncategories: {hat: {uses: [hed]}}", "there is no slot 'hed'"),
        ("slots: {head: 1}\ncategories: {hat: {uses: [head], use: 1}}", "categories.hat.use"),
        ("slots: {head: many}\ncategories: {hat: {uses: [head]}}", "slots.head"),
        ("slots: {head: 1}\ncategories: {hat: {}}", "either uses or uses_one_of"),
        ("slots: {head: 1}\nslots: {head: 2}", "occurs twice"),
        ("slots: &a {head: 1}\ncategories: *a", "alias"),
        ("[" * 40 + "]" * 40, "nested more than 16 levels"),
        ("- 1", "must hold a mapping"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("x" * (1 << 20) + "y", "at most 1048576 are read"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path, capsys, text, said):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(CurateError, match=said):
        read_rules(tmp_path / "rules.yaml")
    assert main(["conflicts", str(tmp_path / "rules.yaml"), "--matrix"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_asks_for_something_to_do(tmp_path, capsys):
    assert main(["conflicts", str(FOLDER / "drawn.yaml")]) == 2
    assert (
        "expected --matrix, --out FILE, or categories to put into one picture; known: person" in capsys.readouterr().err
    )
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("none.yaml") == 1


def test_the_command_prints_the_table_and_draws_it(tmp_path, capsys):
    command = ["conflicts", str(FOLDER / "drawn.yaml"), "--matrix", "--out", str(tmp_path / "m.png")]
    assert main(command) == 0
    assert "hat + hat: slot head" in capsys.readouterr().out
    assert (tmp_path / "m.png").exists()
    assert main(["conflicts", str(FOLDER / "drawn.yaml"), "person", "hat"]) == 0
    assert "hat: head" in capsys.readouterr().out


def test_the_instruction_numbers_every_source_beside_its_person(people):
    names = ["hat", "person", "person", "mug", "instrument", "background"]
    seats = solve(people, names).seats
    text = instruction(people, names, seats)
    assert all(text.count(f"the {name} from image {i}") == 1 for i, name in enumerate(names, 1))
    assert text.startswith("Show the person from image 2 wearing the hat from image 1")
    assert text.endswith(", before the background from image 6.")
    with pytest.raises(CurateError, match="one seat for each"):
        instruction(people, names, ())
