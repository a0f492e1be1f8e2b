"""Questions in secure sums: hospitals' kits and the server's part, no process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace
from safetensors.numpy import load_file

from fl_helpers import exchange, regression, survival, trees, validation
from fl_helpers import federated_statistics as statistics
from fl_helpers.analysis import ask_silos
from fl_helpers.cross_silo import secure, turn
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.fixed_point import encode_arrays
from fl_helpers.cross_silo.on_premises import analyses, gate, job, provision, site
from fl_helpers.cross_silo.on_premises.attendance import Answers
from fl_helpers.cross_silo.on_premises.questions import Question, allow_questions
from fl_helpers.cross_silo.on_premises.record import Record
from fl_helpers.cross_silo.on_premises.secure_questions import (
    SecureQuestionController,
    about,
    others,
)

from .conftest import telling_bytes

pytestmark = pytest.mark.engines
NAMES = ["Hospital A", "Hospital B", "Hospital C", "Hospital D"]
A, B, C, D = NAMES
LINEAR = "fl_helpers.regression:silo_linear"
DENIED = "SECURE_SUM_DENIED"
TABLES = """
import numpy as np
from fl_helpers import regression, survival, trees, validation
from fl_helpers.cross_silo.turn import Tables

def load(data):
    rng = np.random.default_rng(ord(data.name))
    n = 40 + ord(data.name)
    x = rng.normal(size=(n, 2))
    y = (x[:, 0] + rng.normal(size=n) > 0) * 1.0
    scored = validation.Scored(1 / (1 + np.exp(-x[:, 0])), y == 1, (x[:, 1] > 0) * 1)
    tables = {"regression": regression.Table(x, y), "validation": scored}
    tables["federated_statistics"] = {"a": x[:, 0]}
    days = np.ceil(rng.exponential(300 * np.exp(-x[:, 0])))
    tables["survival"] = survival.Survival(days, rng.random(n) < 0.7, x)
    tables["trees"] = trees.Rows(x, y)
    return Tables(n, tables, columns={"row": np.arange(n), "odd": np.arange(n) % 2})
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kits with certificates, made once: a second of work for each."""
    folder = tmp_path_factory.mktemp("made")
    example = Path(exchange.__file__).with_name("cross_silo") / "silos.yaml"
    federation = read_federation(example)
    federation = replace(
        federation, on_premises=replace(federation.on_premises, host="localhost")
    )
    return provision.provision(federation, folder)


class Hospital:
    """A hospital's worker: what comes in is answered, and passes the gate."""

    def __init__(self, kit, silo):
        self.kit, self.silo = kit, silo
        self.context = FLContext()
        self.context.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(kit)))
        self.start("job")

    def start(self, run):
        """Another process, of this run; the kit stays."""
        self.context.set_prop(FLContextKey.CURRENT_RUN, run)
        self.executor = analyses.QuestionExecutor()

    def __call__(self, task, message):
        reply = self.executor.execute(task, message, self.context, Signal())
        return gate.EgressGate().process(reply, self.context)

    @property
    def tables(self):
        own = site.read_site(self.kit)
        return turn.load_function(own.tables)(Path(own.data))

    def ledger(self):
        return exchange.read_ledger(self.kit / "ledger.jsonl")[0]


class Server(SecureQuestionController):
    """The server's part; its messages are calls. tamper(silo, task, message): what a
    server that does not keep to the protocol makes of a message, None to lose it."""

    def __init__(self, hospitals, folder, context):
        super().__init__()
        self.hospitals, self.tamper = hospitals, lambda silo, task, message: message
        self.job = analyses.read_analysis(context)
        self.record = Record(folder / self.job.run.name)
        (self.record.folder / self.job.id).mkdir()  # as `asking` does
        self.replies = []
        self.number = 0

    def _send(self, task, index, sites, message):
        answers = Answers()
        message["round"] = index
        for name in sites:
            silo = self.job.silos[name]
            sent = self.tamper(silo, task, Shareable(dict(message)))
            if sent is None:
                continue
            reply = self.hospitals[silo](task, sent)
            self.replies.append((silo, task, reply))
            try:
                if (code := reply.get_return_code()) != ReturnCode.OK:
                    raise exchange.Refused(silo, f"the site answered {code}")
                answers.updates[silo] = self._take(task, reply, silo, index)
            except Exception as error:
                answers.refused[silo] = getattr(error, "reason", str(error))
        return answers

    def ask(self, function=LINEAR, silos=NAMES, needed=3, where=(), **settings):
        """The sum and the event of a question."""
        settings = settings or {"beta": [0.1, 1 / 3, -2.0]}
        text = Question(function, settings, "", dict(where)).text()
        self.number += 1
        self._put(self.number, sorted(silos), text, needed)
        events = (self.record.folder / "events.jsonl").read_text().splitlines()
        path = self.record.folder / self.job.id / f"{self.number:06d}"
        found = None
        if path.exists():
            found = load_file(path / "all-silos.safetensors")
            found = {k.removeprefix(f"{function} "): v for k, v in found.items()}
        return found, json.loads(events[-1])


@pytest.fixture
def begin(made, tmp_path):
    """begin("name"): a run of these hospitals, which have said hello."""
    (tmp_path / "tables.py").write_text(TABLES)
    hospitals = {}
    for silo in NAMES:
        kit = tmp_path / "kits" / site.site_name(silo)
        shutil.copytree(made / kit.name, kit)
        own = replace(
            site.read_site(kit),
            data=str(tmp_path / silo[-1]),
            tables=f"{tmp_path}/tables.py:load",
        )
        site.write_site(kit, own)
        allow_questions(kit, secure=True)
        hospitals[silo] = Hospital(kit, silo)

    def begin(name="heart", names=NAMES):
        analysis = analyses.Analysis(name, secure=True)
        folder = analyses.write_analysis(analysis, tmp_path / "jobs", names)
        for silo in names:
            workspace = Workspace(str(hospitals[silo].kit))
            shutil.copytree(
                folder / "app" / job.CONFIG,
                Path(workspace.get_app_dir(name)) / job.CONFIG,
            )
            hospitals[silo].start(name)
        server = Server(hospitals, tmp_path / "server", hospitals[names[0]].context)
        server._begin()
        return server

    return begin


def plain(server, function=LINEAR, silos=NAMES, odd=None, **settings):
    """What `ask_silos` says of the same rows."""
    settings = settings or {"beta": [0.1, 1 / 3, -2.0]}
    name = function.partition(":")[0].rpartition(".")[2]
    rows = {}
    for silo in silos:
        tables = server.hospitals[silo].tables
        chosen = tables.columns["odd"] == odd if odd is not None else slice(None)
        data = tables.tables[name]
        rows[silo] = type(data)(*(part[chosen] for part in data))
    module = {"regression": regression, "validation": validation}[name]
    return ask_silos(rows)(getattr(module, function.rpartition(":")[2]), **settings)


def assert_equal(found, expected):
    """Two ways to round a sum of four: 4 * 2^-53 of the sum of sizes, at most."""
    assert {*found} == {*expected}
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12)


def words_of_each(server, silos=NAMES):
    found = {}
    for silo in silos:
        answer = plain(server, silos=[silo])
        found[silo] = encode_arrays(silo, answer)
    return found


# -- the sum, and what else is seen


def test_the_sum_is_that_of_the_plain_answers(begin):
    server = begin()
    found, event = server.ask()
    assert event["silos"] == NAMES and event["codes"] == {}
    assert_equal(found, plain(server))
    confusion = {"threshold": 0.5, "groups": 2}
    name = "fl_helpers.validation:silo_confusion"
    found, _ = server.ask(name, **confusion)
    expected = plain(server, name, **confusion)
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in expected.items()
    }  # counts, and how many silos withheld a cell


def test_nothing_of_an_answer_leaves_and_the_ledger_says_what_does(begin):
    server = begin()
    server.ask()
    words = words_of_each(server)
    pieces = {silo: telling_bytes(own) for silo, own in words.items()}
    for silo, _, reply in server.replies:
        parts = [v for v in reply.values() if isinstance(v, bytes | str)]
        content = b"".join(v.encode() if isinstance(v, str) else v for v in parts)
        assert not any(piece in content for piece in pieces[silo])
    for silo, hospital in server.hospitals.items():
        lines = hospital.ledger()
        assert [line["what"] for line in lines] == [
            "hello", "question", "layout", "masked_numbers", "num_examples",
            "attempt", "mask",
        ]  # fmt: skip
        assert lines[3]["bytes"] == words[silo].nbytes
        found = {
            path.relative_to(server.record.folder.parents[1]).parts[:2]
            for path in server.record.folder.parents[1].rglob("*")
            if path.is_file()
            and any(piece in path.read_bytes() for piece in pieces[silo])
        }  # the search finds what is there: in its own kit
        assert found == {("kits", site.site_name(silo))}


class Ask:
    """An `analysis.Ask` of secure sums, by calls."""

    def __init__(self, server):
        self.server, self.questions = server, 0

    def __call__(self, function, **settings):
        name = f"{function.__module__}:{function.__name__}"
        found, event = self.server.ask(name, **analyses.plain(settings))
        assert found is not None, event
        self.questions += 1
        return found


def in_one_process(server, name):
    tables = {silo: hospital.tables for silo, hospital in server.hospitals.items()}
    return ask_silos({silo: found.tables[name] for silo, found in tables.items()})


def test_a_cox_model_is_that_of_the_simulation(begin):
    server = begin()
    ask = Ask(server)
    plain_ask = in_one_process(server, "survival")
    fits = [survival.fit_cox(of, 2, ties="breslow") for of in (ask, plain_ask)]
    assert (fits[0].rounds, fits[0].events) == (fits[1].rounds, fits[1].events)
    for name in ("beta", "covariance", "loglik"):
        one, other = (getattr(fit, name) for fit in fits)
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9, err_msg=name)
    tests = [survival.proportional_hazards(of, fits[1])[0].p for of in (ask, plain_ask)]
    assert tests[0] == pytest.approx(tests[1])
    edges = [0, 150, 400]
    tables = [of(survival.silo_life_table, edges=edges) for of in (ask, plain_ask)]
    assert {k: v.tolist() for k, v in tables[0].items()} == {
        k: v.tolist() for k, v in tables[1].items()
    }


def test_trees_are_those_of_the_simulation_bit_for_bit(begin):
    """Their sums are whole numbers, so secure sums round nothing."""
    server = begin()
    ask = Ask(server)
    bins = trees.even_bins({"a": (-3.0, 3.0), "b": (-3.0, 3.0)}, bins=4)
    growth = trees.Growth(trees=2, depth=1, rate=0.3)
    grown = [
        trees.fit_trees(of, bins, growth=growth).to_json()
        for of in (ask, in_one_process(server, "trees"))
    ]
    assert grown[0] == grown[1] and ask.questions == 1 + 2 * 2  # a tree has two levels
    assert len(trees.trees_from_json(grown[0]).trees) == 2


# -- a coordinator that does not keep to the protocol


def test_one_that_is_asked_something_else_does_not_answer(begin):
    server = begin()
    other = Question(LINEAR, {"beta": [9.0, 9.0, 9.0]}).text()

    def tamper(silo, task, message):
        if silo == B and "asked" in message:
            message["asked"] = other
        return message

    server.tamper = tamper
    found, event = server.ask()
    assert found is None and event["silos"] == [] and event["codes"] == {B: DENIED}


def test_one_that_is_told_what_fits_its_other_question_gives_noise(begin):
    """The question of the masks is made for it, too: then nothing cancels."""
    server = begin()
    other = Question(LINEAR, {"beta": [9.0, 9.0, 9.0]}).text()
    layouts = {}

    def tamper(silo, task, message):
        if silo == B and "asked" in message:
            message["asked"] = other
        if silo == B and task in ("answer", "open"):
            asked = secure.Question.read(message["question"])
            model = about(other, layouts["text"])
            message["question"] = replace(asked, model=model).text()
        if task == "answer":
            layouts["text"] = server.replies[4][2]["layout"]
        return message

    server.tamper = tamper
    found, event = server.ask()
    assert found is None and event["silos"] == [] and event["codes"] == {}
    assert "did not cancel: one was told something else" in event["reason"]


def test_a_forged_form_of_the_answer_is_denied(begin):
    """All silos are told the same, but not what their answers look like."""
    server, models = begin(), []

    def tamper(silo, task, message):
        if task == "answer":
            forged = json.dumps({f"{LINEAR} rows": ["int64", []]})
            models.append(about(message["asked"], forged))
        if task in ("answer", "open"):
            asked = secure.Question.read(message["question"])
            message["question"] = replace(asked, model=models[0]).text()
        return message

    server.tamper = tamper
    _, event = server.ask()
    assert event["codes"] == dict.fromkeys(NAMES, DENIED)
    names = {
        e["what"] for hospital in server.hospitals.values() for e in hospital.ledger()
    }
    assert not names & {"masked_numbers", "mask"}


def test_a_set_of_two_is_denied_by_server_and_hospital(begin):
    server = begin()
    found, event = server.ask(silos=[A, B], needed=2)
    assert found is None and event["silos"] == []

    def tamper(silo, task, message):
        if "question" in message:
            asked = secure.Question.read(message["question"])
            message["question"] = replace(asked, silos=(A, B)).text()
        return message

    server.tamper = tamper
    _, event = server.ask(silos=[A, B, C])
    assert {event["codes"][silo] for silo in (A, B)} == {DENIED}


def test_a_question_that_is_over_is_not_opened_or_answered_again(begin):
    server = begin()
    server.ask()
    asked = server.sum.asked
    server.ask(beta=[0.0, 0.0, 0.0])
    for task in ("answer", "open"):
        message = Shareable({"question": asked.text(), "round": asked.round})
        message |= {"hellos": server.hellos, "asked": Question(LINEAR, {}).text()}
        reply = server.hospitals[A](task, Shareable(message))
        assert reply.get_return_code() == DENIED
    text = Question(LINEAR, {"beta": [0.1, 0.0, 0.0]}).text()
    asked = replace(asked, kind="train", model="0" * 64)  # a log of its own, if taken
    message = {"question": asked.text(), "round": 1, "asked": text}
    message = Shareable(message | {"hellos": server.hellos})
    before = len(server.hospitals[A].ledger())
    assert server.hospitals[A]("answer", message).get_return_code() == DENIED
    assert len(server.hospitals[A].ledger()) == before + 1  # it was not worked out
    for change in ({"kind": "train"}, {"run": "0" * 32}, {"round": 9}):
        asked = replace(server.sum.asked, **change)
        message = Shareable({"question": asked.text(), "round": 2})
        assert server.hospitals[A]("open", message).get_return_code() == DENIED


def test_who_is_not_believed_is_in_no_sum(begin):
    """A hello with another key, of one silo to all others."""
    server = begin()
    hello = json.loads(server.hellos[D])
    hello["said"]["key"] = json.loads(server.hellos[C])["said"]["key"]
    server.hellos[D] = json.dumps(hello).encode()
    _, event = server.ask()
    assert event["codes"] == dict.fromkeys(NAMES, DENIED)


# -- who is left out


def test_three_of_four_and_then_four_would_give_away_the_fourth(begin):
    """Women and men of three, all of four: nothing was asked twice."""
    server = begin()
    three = [A, B, C]
    for odd in (0, 1):
        found, _ = server.ask(silos=three, where={"odd": (odd, odd)})
        assert_equal(found, plain(server, silos=three, odd=odd))
    found, event = server.ask()
    assert found is None and event["codes"] == dict.fromkeys(three, DENIED)
    later = begin("later")  # in another run, of another function
    name = "fl_helpers.validation:silo_ranking"
    found, event = later.ask(name, min_count=10)
    assert found is None and event["codes"] == dict.fromkeys(three, DENIED)
    found, _ = later.ask(name, silos=three, min_count=10)
    assert_equal(found, plain(later, name, silos=three, min_count=10))


def test_one_that_refuses_first_is_left_out_and_one_that_is_lost_ends_it(begin):
    server = begin()
    allow_questions(server.hospitals[D].kit, minimum=150, secure=True)  # it has 108
    found, event = server.ask()
    assert event["codes"] == {D: "TOO_FEW"} and event["silos"] == [A, B, C]
    assert_equal(found, plain(server, silos=[A, B, C]))
    found, event = server.ask(needed=4)
    assert found is None and event["codes"] == {D: "TOO_FEW"}
    server.tamper = lambda silo, task, m: None if (silo, task) == (B, "open") else m
    found, event = server.ask(silos=[A, B, C])
    assert found is None and event["codes"] == {B: "MISSING"}
    server.tamper = lambda silo, task, message: message
    found, _ = server.ask(silos=[A, B, C])  # the same set may ask again
    assert_equal(found, plain(server, silos=[A, B, C]))


def test_another_form_of_answer_is_named(begin):
    server = begin()
    run = server.hospitals[D].executor.execute

    def wide(task, *more):
        reply = run(task, *more)
        if task == "layout":
            found = reply["update"]
            found.arrays = found.arrays | {"gradient": np.zeros(4), "more": np.ones(1)}
        return reply

    server.hospitals[D].executor.execute = wide
    found, event = server.ask()
    differ = [f"{LINEAR} {name}" for name in ("gradient", "more")]
    assert event["codes"] == {D: f"another form of answer than others in {differ}"}
    assert_equal(found, plain(server, silos=[A, B, C]))
    assert others({}) == {}


def test_a_worker_that_is_killed_works_it_out_again(begin):
    server = begin()
    asked = []

    def tamper(silo, task, message):
        if silo == C and task in ("answer", "open"):
            server.hospitals[C].start("heart")
            asked.append(task)
        return message

    server.tamper = tamper
    found, _ = server.ask()
    assert asked == ["answer", "open"]
    assert_equal(found, plain(server))


# -- the hospital's rules


def test_a_hospital_of_secure_sums_answers_no_plain_question(begin):
    server = begin()
    text = Question(LINEAR, {"beta": [0.0, 0.0, 0.0]}).text()
    hospital = server.hospitals[A]
    before = len(hospital.ledger())
    reply = hospital("ask", Shareable({"question": text, "round": 1}))
    assert reply.get_return_code() == "QUESTION_DENIED"
    assert [line["what"] for line in hospital.ledger()[before:]] == [
        "code QUESTION_DENIED"
    ]
    allow_questions(hospital.kit)  # and one that takes both
    reply = hospital("ask", Shareable({"question": text, "round": 1}))
    assert reply.get_return_code() == ReturnCode.OK
    found, _ = server.ask()
    assert_equal(found, plain(server))


def test_the_gate_lets_out_no_plain_answer_by_itself(begin):
    """An executor that forgets to seal: the gate holds what the hospital has set."""
    server = begin()
    hospital = server.hospitals[A]
    sums = hospital.executor.sums
    message = Shareable({"asked": Question(LINEAR, {"beta": [0.0] * 3}).text()})
    message |= {"hellos": server.hellos, "round": 1}
    hospital("layout", Shareable(message))
    found = sums.last[2]
    for spoil in ({"seal": None}, {"rows": 3}):
        kept = {name: getattr(found, name) for name in spoil}
        for name, value in spoil.items():
            setattr(found, name, value)
        reply = gate.make_reply(ReturnCode.OK)
        reply["update"] = found
        reply = gate.EgressGate().process(reply, hospital.context)
        assert reply.get_return_code() != ReturnCode.OK
        assert not {"layout", exchange.UPDATE} & {*reply}
        for name, value in kept.items():
            setattr(found, name, value)


def test_values_beyond_a_sum_stay_with_a_reason_in_the_log(begin, caplog):
    server = begin()
    hospital = server.hospitals[A]
    run = hospital.executor.execute

    def huge(task, *more):
        reply = run(task, *more)
        if task == "answer":
            reply["update"].arrays = reply["update"].arrays | {
                "squares": np.array(1e70)
            }
        return reply

    hospital.executor.execute = huge
    _, event = server.ask()
    assert event["codes"] == {A: "TASK_RESULT_FILTER_ERROR"}
    assert "silo 'Hospital A' has 'squares' up to 1e+70" in caplog.text


@pytest.mark.parametrize("name", ["silo_table", "finest_counts"])
def test_what_is_no_sum_is_refused_everywhere(begin, tmp_path, name):
    module = statistics if name == "silo_table" else validation
    ask = analyses.EngineAsk(tmp_path, iter(()), "abc", 3, secure=True)
    with pytest.raises(ValueError, match="for each silo alone: ask without secure"):
        ask(getattr(module, name))
    _, event = begin().ask(f"{module.__name__}:{name}", most=3)
    assert event["codes"] == dict.fromkeys(NAMES, "QUESTION_DENIED")


# -- who asks


def test_an_ask_in_secure_sums_has_no_answers_of_single_silos(tmp_path):
    ask = analyses.EngineAsk(tmp_path, iter(()), "abcd", 3, secure=True)
    with pytest.raises(ValueError, match="no answers of single silos: ask without"):
        ask.each(regression.silo_linear, beta=[0.0])
    with pytest.raises(ValueError, match="a secure sum needs 3 silos or more"):
        ask.about(silos="ab")
    assert ask.about(silos="abc").secure
    assert not [*tmp_path.iterdir()]  # nothing was sent


def test_an_analysis_in_secure_sums_needs_three(tmp_path):
    with pytest.raises(ValueError, match="quorum 2: a secure sum needs 3 silos"):
        analyses.Analysis("a", 2, secure=True)
    with pytest.raises(ValueError, match="secure must be True or False"):
        analyses.Analysis("a", secure="yes")
    two = analyses.Analysis("a", secure=True)
    with pytest.raises(ValueError, match="2 silos: a secure sum needs 3"):
        analyses.write_analysis(two, tmp_path, "ab")


def test_a_sum_that_cannot_be_read_is_an_error_with_the_reason(tmp_path):
    said = {"event": "answered", "question": 1, "silos": [], "codes": {}}
    said["reason"] = "the masks of 3 silos did not cancel"
    ask = analyses.EngineAsk(tmp_path, iter([said]), "abc", 3, secure=True)
    with pytest.raises(analyses.QuestionRefused, match="did not cancel"):
        ask(regression.silo_linear, beta=[0.0])
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["needed"] == 3
