"""What a hospital answers, and what it refuses, without any process."""

import fcntl
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from fl_helpers import exchange, regression, survival, trees, validation
from fl_helpers.analysis import TooFew
from fl_helpers.cross_silo.on_premises import analyses, gate, questions, site
from fl_helpers.cross_silo.on_premises.questions import (
    COHORTS,
    KNOWN,
    Denied,
    Question,
    Rules,
    allow_questions,
    answer,
    expected_of,
    read_question,
    read_rules,
)
from fl_helpers.cross_silo.on_premises.site import ANSWERS
from fl_helpers.cross_silo.turn import Tables

pytestmark = pytest.mark.engines
LINEAR = "fl_helpers.regression:silo_linear"
RANKING = "fl_helpers.validation:silo_ranking"


@pytest.fixture
def kit(tmp_path):
    (tmp_path / "local").mkdir()
    allowed = {"class_allow_list": ["the.executor"]}
    site.write_local(tmp_path, "resources.json", allowed)
    site.write_site(tmp_path, site.Site("A", "a", "data", "x:y"))
    return tmp_path


def rows(n=60):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2))
    return regression.Table(x, (x[:, 0] + rng.normal(size=n) > 0) * 1.0)


def tables(n=60):
    table = rows(n)
    half = np.arange(n) < n // 2
    scored = validation.Scored(1 / (1 + np.exp(-table.x[:, 0])), table.y == 1, half * 1)
    found = {"regression": table, "validation": scored}
    found["trees"] = trees.Rows(table.x, table.y)
    days = np.arange(1.0, n + 1)  # an event a day, but every third is censored
    found["survival"] = survival.Survival(days, np.arange(n) % 3 > 0, table.x)
    found["federated_statistics"] = {"row": days}
    return Tables(n, found, columns={"row": np.arange(n), "half": half * 1.0})


def ask(kit, function=LINEAR, number=1, table="", where=(), **settings):
    settings = settings or {"beta": [0.0, 0.0, 0.0]}
    text = Question(function, settings, table, dict(where)).text()
    return answer(kit, "A", tables(), text, number)


def out(kit, found, code=None):
    """What the gate makes of it."""
    workspace = SimpleNamespace(get_root_dir=lambda: str(kit))
    context = SimpleNamespace(get_prop={
        FLContextKey.WORKSPACE_OBJECT: workspace, FLContextKey.TASK_NAME: "ask",
    }.get)  # fmt: skip
    message = make_reply(code or ReturnCode.OK)
    message["update"] = found
    return gate.EgressGate().process(message, context)


def test_a_hospital_answers_nothing_until_it_has_said_what(kit):
    with pytest.raises(Denied, match="answers no questions"):
        ask(kit)
    allow_questions(kit, [LINEAR])
    assert ask(kit).rows == 60
    with pytest.raises(Denied, match="not on this hospital's list"):
        ask(kit, "fl_helpers.regression:silo_logistic")
    allow_questions(kit, [])
    with pytest.raises(Denied):
        ask(kit)
    with pytest.raises(ValueError, match=r"not known: \['os:system'\]"):
        allow_questions(kit, ["os:system"])
    with pytest.raises(ValueError, match="minimum 1 below 2"):
        allow_questions(kit, minimum=1)


def test_runs_may_name_the_class_that_answers_only_then(kit):
    def classes():
        text = (kit / "local" / "resources.json").read_text()
        return json.loads(text)["class_allow_list"]

    kind = analyses.QuestionExecutor
    assert f"{kind.__module__}.{kind.__name__}" == ANSWERS
    for _ in range(2):
        allow_questions(kit)
        assert classes() == ["the.executor", ANSWERS]
    allow_questions(kit, [])
    assert classes() == ["the.executor"]


def test_every_function_that_can_be_asked_has_a_minimum():
    assert len(KNOWN) == 18
    for function in KNOWN.values():
        names = function.__code__.co_varnames[: function.__code__.co_kwonlyargcount + 1]
        assert {*names} & {*questions.LIMITS}, function


def test_the_answer_is_what_the_function_returns(kit):
    allow_questions(kit)
    beta = [0.1, 1 / 3, -2e-17]
    found = ask(kit, beta=beta)
    plain = regression.silo_linear(rows(), beta=beta)
    message = out(kit, found)
    assert message.get_return_code() == ReturnCode.OK
    expected = expected_of(message["layout"], LINEAR)
    folder = gate.unpack(message, kit / "inbox", exchange.UPDATE)
    update = exchange.read_update(
        folder, expected, silo="A", round_index=1, limits=questions.ANSWER
    )
    for name, value in plain.items():
        sent = update.params[f"{LINEAR} {name}"].numpy()
        assert sent.shape == np.shape(value) and (sent == value).all()
    assert len(update.params) == len(plain)


def test_every_array_is_a_line_of_the_ledger_and_so_is_the_question(kit):
    allow_questions(kit)
    out(kit, ask(kit, number=7))
    lines, _ = exchange.read_ledger(kit / "ledger.jsonl")
    what = [(line["direction"], line["what"], line["round"]) for line in lines]
    names = ("squares", "gradient", "information", "rows")
    sent = [("out", f"{LINEAR} {name}", 7) for name in names]
    assert what == [("in", "question", 7), *sent, ("out", "num_examples", 7)]
    (asked,) = (kit / questions.QUESTIONS).read_text().splitlines()
    assert json.loads(asked)["sha256"] == lines[0]["sha256"]
    assert json.loads(json.loads(asked)["question"])["function"] == LINEAR


def test_what_is_no_number_does_not_leave(kit, monkeypatch):
    allow_questions(kit)
    for value, why in ((math.nan, "NaN"), ("Smith", "not as numbers")):
        monkeypatch.setitem(KNOWN, LINEAR, lambda data, v=value, **_: {"mean": v})
        with pytest.raises(ValueError, match=why):
            ask(kit)


@pytest.mark.parametrize(
    "function",
    [
        "os:system", "builtins:eval", "fl_helpers.regression:__builtins__", "",
        "fl_helpers.regression:np", "fl_helpers.regression:fit_linear",
        "/tmp/evil.py:run", "../evil.py:run", "fl_helpers.regression", LINEAR + " ",
        "fl_helpers.regression:silo_linear.__globals__", 7, None, [LINEAR],
    ],
)  # fmt: skip
def test_a_forged_name_is_refused(kit, function):
    allow_questions(kit)
    with pytest.raises(Denied):
        ask(kit, function)
    # Nor if somebody has put it on the hospital's list by hand.
    if isinstance(function, str):
        with pytest.raises(Denied):
            Rules((function, LINEAR), 10).check(Question(function, {"beta": [0]}))


FORGED = {
    "no JSON": "{",
    "not a text": b"{}",
    "too long": " " * (questions.MAX_QUESTION + 1),
    "another key": '{"function": "%s", "settings": {}, "code": "x"}',
    "a key twice": '{"function": "%s", "function": "os:system", "settings": {}}',
    "settings in a list": '{"function": "%s", "settings": [1]}',
    "NaN": '{"function": "%s", "settings": {"beta": [NaN]}}',
    "infinite": '{"function": "%s", "settings": {"beta": [1e999]}}',
    "a huge number": '{"function": "%s", "settings": {"beta": [100000]}}',
    "an endless number": '{"function": "%s", "settings": {"beta": [1%s]}}',
    "deep": '{"function": "%s", "settings": {"beta": ' + "[" * 99 + "]" * 99 + "}}",
    "very deep": '{"function": "%s", "settings": ' + "[" * 99999,
    "a long text": '{"function": "%s", "settings": {"beta": "' + "x" * 999 + '"}}',
    "a long name": '{"function": "%s", "settings": {"' + "x" * 999 + '": 1}}',
    "a long list": '{"function": "%s", "settings": {"beta": [' + "0," * 20000 + "0]}}",
    "where by text": '{"function": "%s", "settings": {}, "where": {"row": ["a", 1]}}',
    "where by one": '{"function": "%s", "settings": {}, "where": {"row": [1]}}',
    "a table of numbers": '{"function": "%s", "settings": {}, "table": 3}',
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
def test_a_forged_question_is_refused(text):
    if isinstance(text, str):
        text = text.replace("1%s", "1" * 5000).replace("%s", LINEAR)
    with pytest.raises(Denied):
        read_question(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": [0.0] * 3, "min_rows": 1}, "min_rows must be at least 10"),
        ({"beta": [0.0] * 3, "min_rows": 9}, "min_rows must be at least 10"),
        ({"beta": [0.0] * 3, "min_rows": 9.9}, "whole number"),
        ({"beta": [0.0] * 3, "min_rows": True}, "whole number"),
        ({"beta": [0.0] * 3, "data": [[1]]}, "settings of fl_helpers.regression"),
        ({"beta": [0.0] * 3, "__class__": 1}, "settings of fl_helpers.regression"),
        ({"min_rows": 20}, "settings of fl_helpers.regression"),
    ],
)
def test_settings_that_are_not_the_functions_are_refused(kit, settings, message):
    allow_questions(kit)
    with pytest.raises(Denied, match=message):
        ask(kit, **settings)


def test_the_hospitals_minimum_stands_where_a_question_names_none(kit):
    allow_questions(kit, minimum=100)
    assert read_rules(kit).check(Question(LINEAR, {"beta": [0]}))[1]["min_rows"] == 100
    sketch = "fl_helpers.federated_statistics:silo_sketch"
    allow_questions(kit)
    assert read_rules(kit).check(Question(sketch, {}))[1] == {"min_rows": 64}


def test_an_answer_that_needs_much_memory_is_refused(kit):
    """10,000 nodes of 2 columns with 10,001 codes: 5 GB of sums."""
    allow_questions(kit)
    bins = {"names": ["a", "b"], "edges": [[], []], "categories": [10_000, 10_000]}
    tree = {key: [value] * 10_000 for key, value in trees.LEAF.items()}
    asked = {"model": {"bins": bins, "base": 0.0, "trees": []}, "tree": tree}
    data = Tables(60, {"trees": trees.Rows(np.zeros((60, 2)), np.arange(60) % 2)})
    text = Question(
        "fl_helpers.trees:silo_histograms", asked | {"nodes": [*range(10_000)]}
    ).text()
    with pytest.raises(Denied, match="more than"):
        answer(kit, "A", data, text, 1)
    bins["categories"] = [1e9, 2]  # int() would make a number of it
    text = Question("fl_helpers.trees:silo_counts", {"bins": bins}).text()
    with pytest.raises(Denied, match="categories"):
        answer(kit, "A", data, text, 2)


def test_a_cohort_is_its_rows_and_differences_are_refused(kit):
    allow_questions(kit)
    found = ask(kit, where={"half": (1, None)})
    assert found.rows == 30 and found.arrays["rows"] == 30
    part = regression.Table(*(part[:30] for part in rows()))
    plain = regression.silo_linear(part, beta=[0, 0, 0])
    assert (found.arrays["gradient"] == plain["gradient"]).all()
    ask(kit)  # 30 more
    with pytest.raises(TooFew, match="differs from that of"):
        ask(kit, where={"row": (1, None)})  # all but one
    with pytest.raises(TooFew, match="fewer than 10 rows") as few:
        ask(kit, where={"row": (None, 8)})
    with pytest.raises(TooFew) as none:  # the same, or one could ask who is there
        ask(kit, where={"row": (99, None)})
    assert str(few.value) == str(none.value)
    with pytest.raises(Denied, match="no such table or column"):
        ask(kit, where={"name": (0, 1)})
    with pytest.raises(Denied, match="no such table or column"):
        ask(kit, table="patients")


def test_every_analysis_goes_through_the_same_ledger(kit):
    """What was asked of a regression is compared with what is asked of a model."""
    allow_questions(kit)
    ask(kit, where={"row": (0, 39)})
    with pytest.raises(TooFew, match="silo_linear"):
        ask(kit, RANKING, where={"row": (0, 38)}, min_count=10)
    ask(kit, RANKING, where={"row": (0, 29)}, min_count=10)
    assert len((kit / COHORTS).read_text().splitlines()) == 2


def test_a_fit_writes_its_cohort_once_and_before_the_answer(kit, monkeypatch):
    allow_questions(kit)
    for _ in range(3):
        ask(kit)
    assert len((kit / COHORTS).read_text().splitlines()) == 1

    def crash(data, **_):
        assert len((kit / COHORTS).read_text().splitlines()) == 2
        raise KeyboardInterrupt  # as a kill would

    monkeypatch.setitem(KNOWN, LINEAR, crash)
    with pytest.raises(KeyboardInterrupt):
        ask(kit, where={"row": (0, 39)})
    monkeypatch.undo()
    with pytest.raises(TooFew, match="differs from that of"):
        ask(kit, where={"row": (0, 38)})


SURVIVAL, CONFUSION = "fl_helpers.survival:", "fl_helpers.validation:silo_confusion"


def test_two_life_tables_do_not_give_away_who_lies_between(kit):
    """Of days 1 to 60, every third without an event: 20 events until day 30."""
    allow_questions(kit)
    table = SURVIVAL + "silo_life_table"
    assert ask(kit, table, edges=[0, 30]).arrays["events"].tolist() == [20]
    with pytest.raises(TooFew, match="differs from that of"):
        ask(kit, table, edges=[0, 32])  # one event more
    with pytest.raises(TooFew):
        ask(kit, table, edges=[0, 32], where={"half": (0, None)})  # all patients, too
    assert ask(kit, table, edges=[0, 30, 45]).arrays["events"].tolist() == [20, 10]
    with pytest.raises(Denied, match="101 intervals or bins"):
        ask(kit, table, edges=[0, *np.linspace(30, 30.1, 100).tolist()])


def test_two_models_are_compared_at_the_hospital_and_not_in_a_sum(kit):
    allow_questions(kit)
    name = "fl_helpers.validation:silo_auroc_difference"
    found, known = tables(), tables().tables["validation"]
    second = np.sqrt(known.score) * (np.arange(60) % 2)
    found.tables["comparison"] = validation.Paired(known.score, second, known.y)
    text = Question(name, {}, "comparison").text()
    sent = answer(kit, "A", found, text, 1).arrays
    expected = validation.auroc_difference(second, known.score, known.y)
    assert (float(sent["value"]), float(sent["error"])) == expected
    with pytest.raises(Denied, match="they do not add"):
        answer(kit, "A", found, text, 2, sealed=True)
    with pytest.raises(Denied, match="min_count must be at least 10 here"):
        text = Question(name, {"min_count": 9}, "comparison").text()
        answer(kit, "A", found, text, 3)
    with pytest.raises(TooFew):  # all but a few rows of the same patients
        text = Question(name, {}, "comparison", {"row": [0, 55]}).text()
        answer(kit, "A", found, text, 4)


def test_two_thresholds_do_not_give_away_who_lies_between(kit):
    allow_questions(kit)
    data = tables().tables["validation"]
    at = np.sort(data.score[data.y])
    first, near = at[12] + 1e-9, at[13] + 1e-9  # one of the ill is between

    def confusion(threshold, **more):
        settings = {"threshold": float(threshold), "groups": 2}
        return ask(kit, CONFUSION, **settings, **more).arrays["counts"]

    assert confusion(first).sum() == 60
    with pytest.raises(TooFew, match="differs from that of"):
        confusion(near)
    with pytest.raises(TooFew, match="differs from that of"):
        confusion(near, table="validation")  # the same table, by its name
    assert confusion(first, where={"half": (0, 1)}).sum() == 60  # the same cohort
    assert confusion(near, where={"half": (1, 1)}).sum() == 30  # it is another one


def test_bins_and_a_threshold_are_compared_and_so_are_two_kinds_of_bins(kit):
    allow_questions(kit)

    def asked(function, **settings):
        text = Question(f"fl_helpers.validation:{function}", settings).text()
        return answer(kit, "A", tables(300), text, 1).arrays

    assert len(asked("finest_counts", most=2)["ill"]) == 2  # so a half is cut
    asked("silo_confusion", threshold=0.5, groups=2)
    asked("silo_score_counts", bins=2)
    for threshold in (0.49, 0.51):
        with pytest.raises(TooFew, match="differs from that of"):
            asked("silo_confusion", threshold=threshold, groups=2)
    asked("silo_confusion", threshold=0.25, groups=2)  # many are between


def test_what_was_cut_is_written_before_it_leaves(kit, monkeypatch):
    allow_questions(kit)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(questions.CohortLedger, "admit_part", full)
    with pytest.raises(OSError, match="disk full"):
        ask(kit, CONFUSION, threshold=0.5, groups=2)
    monkeypatch.undo()
    ask(kit, CONFUSION, threshold=0.5, groups=2)
    found = (kit / COHORTS).read_text().splitlines()
    # All patients, the ill and the healthy below, and the same of two groups.
    assert len(found) == 1 + 2 + 4


def test_two_sketches_differ_by_as_many_rows_as_one_needs(kit):
    allow_questions(kit)
    sketch = "fl_helpers.federated_statistics:silo_sketch"

    def asked(low, high):
        text = Question(sketch, {}, "", {"row": [low, high]}).text()
        return answer(kit, "A", tables(200), text, 1).arrays["rows"]

    assert asked(0, 99) == 100
    with pytest.raises(TooFew, match="fewer than 64 rows"):
        asked(0, 129)  # the sketch of 30 by subtraction
    assert asked(0, 163) == 164


def test_a_group_of_few_has_no_log_rank_test(kit):
    """Observed and expected events of a group of one are the patient's own."""
    allow_questions(kit)
    found = tables()
    data = found.tables["survival"]
    for few, fine in ((np.arange(60) == 20, False), (np.arange(60) % 2 == 0, True)):
        found.tables["survival"] = data._replace(x=np.column_stack([few, few]) * 1.0)
        text = Question(SURVIVAL + "silo_log_rank", {"group": 0, "groups": 2}).text()
        if fine:
            assert answer(kit, "A", found, text, 1).arrays["observed"].sum() == 40
            continue
        for groups in (1, 2):  # nor does it say whether there is somebody
            asked = Question(SURVIVAL + "silo_log_rank", {"group": 0, "groups": groups})
            with pytest.raises(survival.TooFewEvents, match="a group has fewer"):
                answer(kit, "A", found, asked.text(), 1)


def test_two_runs_ask_one_after_the_other(kit):
    """Or neither would see the other's cohort, which differs by one patient."""
    allow_questions(kit)
    ask(kit, where={"row": (0, 29)})
    thread = threading.Thread(target=ask, args=(kit,))
    with (kit / COHORTS).with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert len((kit / COHORTS).read_text().splitlines()) == 1
    thread.join()
    assert len((kit / COHORTS).read_text().splitlines()) == 2


def test_other_columns_or_other_rows_are_other_data():
    """Else a row that is in two secure sums could be taken for another patient."""
    whole = Tables(3, {}, {"regression": np.ones(3)}, {"age": np.arange(3)})
    others = [
        Tables(4, {}, whole.rows, whole.columns),
        Tables(3, {}, {"regression": np.arange(3) > 0}, whole.columns),
        Tables(3, {}, {"trees": np.ones(3)}, whole.columns),
        Tables(3, {}, whole.rows, {"age": np.arange(3)[::-1]}),
    ]
    assert len({*map(questions._data_digest, [whole, *others])}) == 5


def test_a_damaged_ledger_of_cohorts_answers_nothing(kit):
    allow_questions(kit)
    ask(kit)
    path = kit / COHORTS
    path.write_text(path.read_text().replace("ff", "fe", 1))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        ask(kit)


def test_a_table_that_does_not_have_its_rows_is_an_error(kit):
    allow_questions(kit)
    text = Question(LINEAR, {"beta": [0, 0, 0]}).text()
    some = Tables(61, {"regression": rows(60)})
    with pytest.raises(ValueError, match="does not have the rows"):
        answer(kit, "A", some, text, 1)
    inside = np.arange(61) != 5
    some = Tables(61, {"regression": rows(60)}, {"regression": inside})
    assert answer(kit, "A", some, text, 1).rows == 60


def test_the_gate_checks_again(kit):
    """An executor that hands over what nobody may have: a code leaves, no number."""
    allow_questions(kit)
    good = ask(kit)
    cases = {
        "off the list": lambda s: setattr(s, "question", Question("os:x", {})),
        "few patients": lambda s: setattr(s, "rows", 3),
        "an object": lambda s: s.arrays.update(x=np.array([object()])),
        "single precision": lambda s: s.arrays.update(x=np.zeros(2, np.float32)),
        "a name with a line": lambda s: s.arrays.update({"a\nb": np.zeros(2)}),
        "too many bytes": lambda s: s.arrays.update(x=np.zeros(2**21 + 1)),
        "NaN": lambda s: s.arrays.update(x=np.array([math.nan])),
    }
    for what, spoil in cases.items():
        found = gate.Sums(dict(good.arrays), 1, good.question, good.rows)
        spoil(found)
        message = out(kit, found)
        assert message.get_return_code() != ReturnCode.OK, what
        assert not {"layout", exchange.UPDATE} & {*message}, what
    assert out(kit, good).get_return_code() == ReturnCode.OK


def test_the_gate_lets_nothing_out_once_the_hospital_has_ended_it(kit):
    allow_questions(kit)
    found = ask(kit)
    allow_questions(kit, [])
    assert out(kit, found).get_return_code() == "QUESTION_DENIED"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TooFew("patient 4711"), "TOO_FEW"),
        (survival.TooFewEvents("two events"), "TOO_FEW"),
        (Denied("os:system"), "QUESTION_DENIED"),
        (ValueError("patient 4711"), ReturnCode.EXECUTION_EXCEPTION),
    ],
)
def test_only_a_code_leaves_of_a_refusal(kit, error, code):
    reply = gate.code_of(error, ReturnCode.EXECUTION_EXCEPTION)
    message = out(kit, None, reply)
    assert message.get_return_code() == code
    assert "4711" not in json.dumps({k: str(v) for k, v in message.items()})


@pytest.mark.parametrize(
    "layout",
    [
        None, b"{}", "[1]", "{", '{"other:f x": ["float64", [1]]}',
        '{"f x": ["float32", [1]]}', '{"f x": ["float64", [-1]]}',
        '{"f x": ["float64", [99999999]]}', '{"f x": ["float64", [1, 1, 1, 1, 1]]}',
        '{"f x": ["float64", [true]]}', '{"f x": ["float64", [1]], "f x": []}',
        '{"f x": ["float64", 1]}', '{"f x": 1}', '{"f ' + "x" * 400 + '": []}',
    ],
)  # fmt: skip
def test_a_server_takes_no_answer_of_another_form(layout):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        expected_of(layout, "f")


def test_settings_are_plain_before_they_travel():
    asked = {"edges": np.linspace(0, 1, 3), "n": np.int64(3), "of": ((1, 2.5), "x")}
    made = analyses.plain(asked)
    assert made == {"edges": [0.0, 0.5, 1.0], "n": 3, "of": [[1, 2.5], "x"]}
    assert type(made["n"]) is int and json.loads(json.dumps(made)) == made


def test_an_analysis_has_a_name_and_numbers():
    for bad in ({"name": "../x"}, {"quorum": 0}, {"deadline": 0.5}, {"idle": -1}):
        with pytest.raises(ValueError):
            analyses.Analysis(**{"name": "a"} | bad)
    with pytest.raises(ValueError, match="quorum 4, but there are 3"):
        analyses.write_analysis(analyses.Analysis("a", 4), Path("x"), "abc")


def a_box(tmp_path, *codes):
    """An `Ask` of three silos, whose server says these codes, one dict a question."""
    said = iter(
        {"event": "answered", "question": n, "codes": c,
         "silos": [s for s in "abc" if s not in c]}
        for n, c in enumerate(codes, start=1)
    )  # fmt: skip
    made = analyses.EngineAsk(tmp_path, said, "abc", 2)
    for number in range(1, len(codes) + 1):
        (tmp_path / f"{number:06d}").mkdir()
        for silo in "abc":
            content = {f"{LINEAR} n": np.array(ord(silo))}
            analyses.save_file(
                content, tmp_path / f"{number:06d}" / f"{silo}.safetensors"
            )
    return made


def test_who_answered_first_has_to_answer_to_the_end(tmp_path):
    ask = a_box(tmp_path, {"c": "TOO_FEW"}, {"c": "TOO_FEW"}, {"b": "MISSING"})
    assert ask(regression.silo_linear)["n"] == ord("a") + ord("b")
    assert ask.silos == ("a", "b") and ask.left_out == {"c": "TOO_FEW"}
    ask(regression.silo_linear)
    with pytest.raises(analyses.QuestionRefused, match="'b': 'MISSING'.*2 silos"):
        ask(regression.silo_linear)


def test_fewer_than_the_quorum_is_an_error_with_the_codes(tmp_path):
    ask = a_box(tmp_path, {"b": "TOO_FEW", "c": "QUESTION_DENIED"})
    with pytest.raises(analyses.QuestionRefused) as error:
        ask(regression.silo_linear)
    assert error.value.codes == {"b": "TOO_FEW", "c": "QUESTION_DENIED"}
    with pytest.raises(ValueError, match="must be of"):
        ask.about(silos=["d"])


def test_the_message_of_a_question_is_plain(tmp_path):
    ask = a_box(tmp_path, {}).about(where={"age": (65, None)}, table="x")
    ask(regression.silo_linear, beta=np.zeros(2))
    written = json.loads((tmp_path / "000001.json").read_text())
    assert written["silos"] == ["a", "b", "c"]
    asked = read_question(written["question"])
    assert asked == Question(LINEAR, {"beta": [0.0, 0.0]}, "x", {"age": [65, None]})
    assert isinstance(Shareable({"question": written["question"]}), dict)


def test_what_the_rules_do_not_stop(kit):
    """Two answers about all patients whose difference is the row of one of them.

    With steep coefficients a gradient is a sum over y minus those on one side of a
    line; between two lines lies one patient. docs/security.md says so.
    """
    allow_questions(kit)
    x = np.sort(rows().x[:, 0])
    cuts = (x[20] + x[21]) / 2, (x[21] + x[22]) / 2
    name = "fl_helpers.regression:silo_logistic"
    sent = [
        ask(kit, name, beta=[-1e6 * cut, 1e6, 0.0]).arrays["gradient"] for cut in cuts
    ]
    patient = rows().x[np.flatnonzero(rows().x[:, 0] == x[21])[0]]
    np.testing.assert_allclose(sent[1] - sent[0], [1, *patient], rtol=1e-9)


COLUMNS = {  # of 60 patients, and whether it may be in a plain regression
    "nobody": (np.zeros(60), True),
    "everybody": (np.full(60, 7.0), True),
    "one": (np.arange(60) == 7, False),
    "all but one": (np.arange(60) != 7, False),
    "nine": (np.arange(60) < 9, False),
    "ten": (np.arange(60) < 10, True),
    "all but ten": (np.arange(60) >= 10, True),
    "nine, of different values": (np.maximum(0, 9 - np.arange(60)), False),
    "ten, of different values": (np.maximum(0, 10 - np.arange(60)), True),
}
PRODUCTS = {
    LINEAR: {"beta": [0.0] * 4},
    "fl_helpers.regression:silo_logistic": {"beta": [0.0] * 4},
    SURVIVAL + "silo_cox": {"beta": [0.0] * 3, "ties": "efron"},
    SURVIVAL + "silo_hazards_over_time": {"beta": [0.0] * 3},
}


def with_columns(*more, n=60):
    found = tables(n)
    for name in ("regression", "survival"):
        data = found.tables[name]
        x = np.column_stack([data.x, *more])
        found.tables[name] = data._replace(x=x)
    return found


@pytest.mark.parametrize("function", PRODUCTS)
@pytest.mark.parametrize(("column", "may"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_that_few_patients_have_is_in_no_plain_regression(
    kit, function, column, may
):
    """What is added up over its ones would be those patients' own columns."""
    allow_questions(kit)
    found, text = with_columns(column), Question(function, PRODUCTS[function]).text()
    assert answer(kit, "A", found, text, 1, sealed=True).arrays
    if may:
        assert answer(kit, "A", found, text, 1).arrays
        return
    with pytest.raises(Denied, match="column 2 of x .* fewer than 10 rows") as error:
        answer(kit, "A", found, text, 1)
    reply = gate.code_of(error.value, ReturnCode.EXECUTION_EXCEPTION)
    assert out(kit, None, reply).get_return_code() == "QUESTION_DENIED"


def test_a_rare_column_is_one_of_the_cohort_and_of_the_hospitals_minimum(kit):
    found = with_columns(np.arange(60) < 20)
    settings = PRODUCTS[LINEAR]
    allow_questions(kit, minimum=21)
    with pytest.raises(Denied, match="fewer than 21 rows"):
        answer(kit, "A", found, Question(LINEAR, settings).text(), 1)
    allow_questions(kit)
    assert answer(kit, "A", found, Question(LINEAR, settings).text(), 1)
    some = Question(LINEAR, settings, where={"row": [15, None]}).text()  # 5 have it
    with pytest.raises(Denied, match="column 2 of x"):
        answer(kit, "A", found, some, 1)


def test_a_rare_outcome_of_a_linear_model_is_a_rare_column(kit):
    """At coefficients of 0 the gradient would be the row of the one that has it."""
    allow_questions(kit)
    found = tables()
    data = found.tables["regression"]
    found.tables["regression"] = data._replace(y=(np.arange(60) == 7) * 5.0)
    text = Question(LINEAR, {"beta": [0.0] * 3}).text()
    with pytest.raises(Denied, match=r"column 2 of x \(y is the last\)"):
        answer(kit, "A", found, text, 1)


@pytest.mark.parametrize(("alone", "may"), [(1, False), (2, True)])
def test_the_only_one_without_a_category_is_singled_out(kit, alone, may):
    """Ones minus three columns of 0 and 1 are the patient in none of the three.

    Two in none of them do pass: docs/security.md says so.
    """
    allow_questions(kit)
    kinds = np.maximum(0, np.arange(60) - alone + 1).clip(0, 1) * (
        1 + np.arange(60) % 3
    )
    found = with_columns(*(kinds == k for k in (1, 2, 3)))
    text = Question(LINEAR, {"beta": [0.0] * 6}).text()
    if not may:
        with pytest.raises(Denied, match="together single out a row"):
            answer(kit, "A", found, text, 1)
        return
    sent = answer(kit, "A", found, text, 1).arrays
    none = sent["information"] @ [1, 0, 0, -1, -1, -1]
    x = found.tables["regression"].x
    np.testing.assert_allclose(none[:3], [2, *x[:2, :2].sum(axis=0)], atol=1e-12)


def test_what_a_leaf_of_one_patient_says(kit):
    allow_questions(kit)
    data = tables().tables["trees"]
    edge = float(np.sort(data.x[:, 0])[-2:].mean())  # one patient is above
    leaf = {key: [value] * 3 for key, value in trees.LEAF.items()}
    leaf |= {"left": [1, -1, -1], "right": [2, -1, -1], "code": [1, 0, 0]}
    leaf["value"] = [0.0, 0.0, 1000.0]
    model = {"bins": {"names": ["a", "b"], "edges": [[edge], []]}, "base": 0.0}
    model["bins"]["categories"] = [0, 0]
    loss = [
        float(ask(kit, "fl_helpers.trees:silo_loss", model=model | {"trees": t})
        .arrays["loss"]) for t in ([], [leaf])
    ]  # fmt: skip
    ill = data.y[data.x[:, 0].argmax()]
    # log(1 + exp(1000)) for a healthy one, 0 for an ill one, log(2) before.
    assert loss[1] - loss[0] == pytest.approx(1000 * (1 - ill) - np.log(2))


def test_what_a_refusal_says(kit):
    """The first event is on day 2: no event until day 1 is answered, until 2 not."""
    allow_questions(kit)
    table = SURVIVAL + "silo_life_table"
    assert ask(kit, table, edges=[0, 1, 30]).arrays["events"].tolist() == [0, 20]
    with pytest.raises(survival.TooFewEvents):
        ask(kit, table, edges=[0, 2, 30])
