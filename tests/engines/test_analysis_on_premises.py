"""Analyses over hospitals that are processes: the bits of the simulation."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fl_helpers import federated_statistics as statistics
from fl_helpers import regression, survival, trees, validation
from fl_helpers.analysis import ask_silos
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.fixed_point import encode_arrays
from fl_helpers.cross_silo.hospital_tables import (
    MERGED,
    PATIENTS,
    RANGES,
    load_tables,
)
from fl_helpers.cross_silo.on_premises import provision, questions
from fl_helpers.cross_silo.on_premises.analyses import QuestionRefused
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.questions import Question
from fl_helpers.data import load_heart_disease

from . import hospital
from .conftest import SILOS_YAML, telling_bytes

pytestmark = pytest.mark.engines
CLEVELAND, HUNGARY, LONG_BEACH = SILOS = ("Cleveland", "Hungary", "VA Long Beach")
TABLES = f"{load_tables.__module__}:{load_tables.__name__}"
WIDTH = 12  # columns: the ECG's two are merged
GROWTH = trees.Growth(trees=3, depth=2, rate=0.3, min_rows=10)


def write_patients(folder, silo):
    """A hospital's own file: its real patients, a score, and a made-up follow-up."""
    heart, rng = load_heart_disease(), np.random.default_rng(len(silo))
    mine = heart.site == silo
    rows = pd.DataFrame(heart.x[mine], columns=list(heart.features))
    rows = rows.rename(columns={"sex_male": "sex"}).assign(disease=heart.y[mine])
    noise = rng.normal(size=len(rows))
    rows["score"] = 1 / (1 + np.exp(-(rows.disease - 0.5) - noise))  # 0 to 1
    rows["group"] = (rows.age > 60) * 1
    rows["days"] = np.ceil(rng.exponential(400, len(rows)))
    rows["died"] = (rng.random(len(rows)) < 0.5) * 1
    if silo == LONG_BEACH:  # too few events for a survival analysis
        rows["died"] = (np.arange(len(rows)) < 5) * 1
    rows["second"] = rows.score**2 * (rng.random(len(rows)) < 0.9)  # a worse model
    folder.mkdir(parents=True)
    rows.to_csv(folder / PATIENTS, index=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    found = {silo: root / silo.replace(" ", "_") for silo in SILOS}
    for silo, folder in found.items():
        write_patients(folder, silo)
    return found


@pytest.fixture(scope="module")
def fleet(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("analysis")
    text = SILOS_YAML.replace("{client}", f"{hospital.__file__}:client")
    for number, (silo, folder) in enumerate(folders.items()):
        own = f"{{organisation: h{number}, data: {folder}}}"
        text += f"  - {{name: {silo}, on_premises: {own}}}\n"
    (root / "silos.yaml").write_text(text)
    provision.provision(read_federation(root / "silos.yaml"), root / "fleet")
    with Fleet(root / "silos.yaml", root / "fleet", ready=60) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def engine(fleet):
    """One `Ask` for all tests that need no other."""
    fleet.allow_questions(TABLES)
    with fleet.ask("heart", quorum=2) as ask:
        yield ask


@pytest.fixture(scope="module")
def local(folders):
    """local("survival"): each hospital's rows, for the simulation."""

    def tables(name, silos=SILOS):
        return {silo: load_tables(folders[silo]).tables[name] for silo in silos}

    return tables


def bits(found):
    """All numbers of a result, as bytes."""
    if isinstance(found, dict):
        return {key: bits(value) for key, value in found.items()}
    if hasattr(found, "__dataclass_fields__"):
        return bits(vars(found))
    return np.asarray(found, dtype=None if found is not None else float).tobytes()


def test_the_regression_of_a_paper_is_that_of_the_simulation(engine, local):
    """Long Beach has five women with whole rows: a column that few patients differ in.
    It refuses, and takes part in the secure sums below."""
    men = local("regression")[LONG_BEACH].x[:, 1]
    assert (men == 0).sum() == 5
    plain = ask_silos(local("regression", SILOS[:2]))
    ask = engine.about()
    assert bits(regression.fit_logistic(ask, WIDTH)) == bits(
        regression.fit_logistic(plain, WIDTH)
    )
    assert bits(regression.fit_linear(ask, WIDTH)) == bits(
        regression.fit_linear(plain, WIDTH)
    )
    assert ask.left_out == {LONG_BEACH: "QUESTION_DENIED"}


def test_a_hospital_with_few_events_is_left_out_and_the_others_are_unharmed(
    engine, local
):
    ask = engine.about()
    fit = survival.fit_cox(ask, WIDTH)
    assert ask.left_out == {LONG_BEACH: "TOO_FEW"}
    two = ask_silos(local("survival", SILOS[:2]))
    assert bits(fit) == bits(survival.fit_cox(two, WIDTH))
    edges = np.linspace(0, 400, 3)
    tables = [of(survival.silo_life_table, edges=edges) for of in (ask, two)]
    curves = [survival.kaplan_meier(table, edges=edges) for table in tables]
    assert bits(curves[0]) == bits(curves[1])
    sexes = {"group": 1, "groups": 2}
    assert survival.log_rank(ask, **sexes) == survival.log_rank(two, **sexes)
    breslow = [survival.fit_cox(of, WIDTH, ties="breslow") for of in (ask, two)]
    tests = [
        survival.proportional_hazards(of, one)
        for of, one in zip((ask, two), breslow, strict=True)
    ]
    assert tests[0] == tests[1]


def test_trees_are_those_of_the_simulation(engine, local):
    names = [n for n in load_heart_disease().features if not n.startswith("ecg_")]
    names += MERGED
    bins = trees.even_bins({c: RANGES.get(c, 2) for c in names}, bins=8)
    grown = [
        trees.fit_trees(of, bins, growth=GROWTH)
        for of in (engine.about(), ask_silos(local("trees")))
    ]
    assert grown[0].to_json() == grown[1].to_json()
    assert len(grown[0].trees) == 3 and max(map(len, grown[0].trees[0].values())) > 3
    fine = trees.even_bins({c: RANGES.get(c, 2) for c in names}, bins=64)
    asks = engine.about(), ask_silos(local("trees"))
    assert trees.equal_bins(asks[0], fine) == trees.equal_bins(asks[1], fine)


def test_a_model_is_validated_without_training(engine, local):
    ask, rows = engine.about(), local("validation")
    plain = ask_silos(rows)
    confusion = {"threshold": 0.5, "groups": 2}
    for function, how in (
        (validation.silo_ranking, {}),
        (validation.silo_score_counts, {"bins": 2}),
        (validation.silo_confusion, confusion),
    ):
        assert bits(ask(function, **how)) == bits(plain(function, **how))
    for silo, found in ask.each(validation.silo_ranking).items():
        assert found == validation.silo_ranking(rows[silo])
    both = engine.about(table="comparison").each(validation.silo_auroc_difference)
    for silo, data in local("comparison").items():
        assert both[silo] == validation.silo_auroc_difference(data)
    slope = engine.about(table="calibration")
    plain = ask_silos(local("calibration"))
    assert bits(regression.fit_logistic(slope, 1)) == bits(
        regression.fit_logistic(plain, 1)
    )


def test_each_hospitals_column_of_the_first_table_and_its_units(engine, local):
    rows = local("federated_statistics")
    sent = statistics.tables_of(engine.about().each(statistics.silo_table))
    assert sent == {silo: statistics.local_table(silo, rows[silo]) for silo in SILOS}
    assert statistics.unit_warnings({s: {"age": sent[s]["age"]} for s in SILOS}) == []
    sketches = engine.about().each(statistics.silo_sketch)
    assert statistics.copy_warnings(sketches) == []


def test_a_cohort_is_asked_for_and_one_patient_less_is_refused(engine, local, folders):
    older = engine.about(where={"age": (50, None)})
    found = older(validation.silo_ranking)
    chosen = {
        silo: validation.Scored(*(part[age >= 50] for part in rows))
        for silo, rows in local("validation").items()
        for age in [load_tables(folders[silo]).columns["age"]]
    }
    able = {silo: chosen[silo] for silo in older.silos}
    assert len(able) >= 2
    assert bits(found) == bits(ask_silos(able)(validation.silo_ranking))
    oldest = {s: load_tables(folders[s]).columns["age"].max() for s in SILOS}
    youngest_out = engine.about(where={"age": (None, max(oldest.values()) - 1)})
    with pytest.raises(QuestionRefused) as error:  # all but the oldest of all
        youngest_out(regression.silo_linear, beta=[0.0] * (WIDTH + 1))
    at = max(oldest, key=oldest.get)
    assert error.value.codes[at] == "TOO_FEW"


@pytest.mark.parametrize(
    ("module", "name", "settings"),
    [
        ("os", "system", {"command": "touch /tmp/x"}),
        ("fl_helpers.regression", "fit_linear", {}),
        ("fl_helpers.regression", "__builtins__", {}),
        ("/tmp/evil.py", "run", {}),
        ("fl_helpers.validation", "finest_counts", {"most": 10**9}),
        ("fl_helpers.validation", "silo_ranking", {"min_count": 1}),
        ("fl_helpers.validation", "silo_ranking", {"data": [[0.5]]}),
    ],
)
def test_a_forged_question_is_refused_everywhere(engine, module, name, settings):
    function = SimpleNamespace(__module__=module, __name__=name)
    with pytest.raises(QuestionRefused) as error:
        engine.about().each(function, **settings)
    assert error.value.codes == dict.fromkeys(SILOS, "QUESTION_DENIED")
    assert engine.about()(validation.silo_ranking)["pairs"] > 0  # all are still there


def test_nan_is_refused_before_it_travels_and_at_the_hospital(engine, monkeypatch):
    with pytest.raises(ValueError, match="not JSON compliant"):
        engine.about()(validation.silo_confusion, threshold=float("nan"), groups=1)
    monkeypatch.setattr(
        Question,
        "text",
        lambda self: json.dumps(self.__dict__),  # NaN passes
    )
    with pytest.raises(QuestionRefused) as error:
        engine.about()(validation.silo_confusion, threshold=float("nan"), groups=1)
    assert error.value.codes == dict.fromkeys(SILOS, "QUESTION_DENIED")


def test_an_error_at_a_hospital_is_a_code_and_names_nobody(engine):
    with pytest.raises(QuestionRefused) as error:
        engine.about()(regression.silo_linear, beta=[0.0])  # 12 columns
    assert set(error.value.codes.values()) == {"EXECUTION_EXCEPTION"}
    assert "12" not in str(error.value)


def test_the_ledger_shows_each_answer(engine, fleet):
    before = {silo: len(fleet.ledger(silo)) for silo in SILOS}
    engine.about()(regression.silo_logistic, beta=[0.0] * (WIDTH + 1))
    names = ("loglik", "gradient", "information", "rows", "cases")
    sent = [f"fl_helpers.regression:silo_logistic {name}" for name in names]
    (asked, refused) = fleet.ledger(LONG_BEACH)[before[LONG_BEACH] :]
    assert [asked["what"], refused["what"]] == ["question", "code QUESTION_DENIED"]
    for silo in SILOS[:2]:
        lines = fleet.ledger(silo)[before[silo] :]
        assert [line["what"] for line in lines] == ["question", *sent, "num_examples"]
        assert {line["verdict"] for line in lines} == {"accepted"}
    server = fleet.kits / "server" / "analyses" / "heart"
    taken = (server / "ledger.jsonl").read_text()
    for line in lines[1:-1]:
        assert line["sha256"] in taken


def test_the_ledger_of_cohorts_survives_a_kill(engine, fleet):
    """What a worker answered before it was killed, the next one remembers."""
    beta = [0.0] * (WIDTH + 1)
    first = engine.about(where={"age": (40, None)}, silos=[CLEVELAND])
    first(regression.silo_linear, beta=beta)
    fleet.kill_worker(CLEVELAND)
    # At Cleveland, between 1 and 9 patients are 40 years old.
    again = engine.about(where={"age": (41, None)}, silos=[CLEVELAND])
    with pytest.raises(QuestionRefused) as error:
        again(regression.silo_linear, beta=beta)
    assert error.value.codes == {CLEVELAND: "TOO_FEW"}
    assert engine.about(where={"age": (40, None)}, silos=[CLEVELAND])(
        regression.silo_linear, beta=beta
    )


def test_a_hospital_that_allows_nothing_answers_nothing(fleet, engine):
    """Off the list, or ended while the run goes on; the others are unharmed."""
    questions.allow_questions(fleet.kits / HUNGARY, [])
    try:
        ask = engine.about()
        ask(validation.silo_ranking)
        assert ask.left_out == {HUNGARY: "QUESTION_DENIED"}
    finally:
        questions.allow_questions(fleet.kits / HUNGARY)


def test_no_answer_is_left_at_the_server(engine, fleet):
    engine.about()(validation.silo_ranking)
    server = fleet.kits / "server" / "analyses" / "heart"
    assert not [*server.rglob("*.safetensors")]


def test_an_analysis_ends_with_its_block_and_can_be_started_again(fleet, engine):
    for _ in range(2):
        with fleet.ask("again", quorum=3) as ask:
            assert ask(validation.silo_ranking)["pairs"] > 0
    events = fleet.kits / "server" / "analyses" / "again" / "events.jsonl"
    found = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert found == ["start", "answered", "done"] * 2
    shutil.rmtree(events.parent)


def test_in_secure_sums_a_fit_is_the_same_and_no_single_answer_is_seen(fleet, local):
    """The last test: it leaves what was opened in the kits."""
    before = {silo: len(fleet.ledger(silo)) for silo in SILOS}
    fleet.allow_questions(TABLES, secure=True)
    try:
        with fleet.ask("plain", quorum=1) as ask:
            with pytest.raises(QuestionRefused) as error:
                ask(validation.silo_ranking)
            assert error.value.codes == dict.fromkeys(SILOS, "QUESTION_DENIED")
        with fleet.ask("sums", secure=True) as ask:
            with pytest.raises(ValueError, match="no answers of single silos"):
                ask.each(validation.silo_ranking)
            fit = regression.fit_logistic(ask, WIDTH)
            beta = fit.beta.tolist()
            ask(regression.silo_logistic, beta=beta)
    finally:
        fleet.allow_questions(TABLES)
    expected = regression.fit_logistic(ask_silos(local("regression")), WIDTH)
    assert fit.rows == expected.rows and fit.rounds == expected.rounds
    for name in ("beta", "covariance", "loglik"):
        one, other = getattr(fit, name), getattr(expected, name)
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12, err_msg=name)
    sent = {"hello", "mask", "layout", "masked_numbers", "num_examples", "attempt"}
    for silo in SILOS:
        lines = [
            e for e in fleet.ledger(silo)[before[silo] :] if e["direction"] == "out"
        ]
        assert {e["what"] for e in lines} == sent | {"code QUESTION_DENIED"}
    # Known bytes of each hospital's last answer, in every file that there is.
    known, found = {}, {silo: set() for silo in SILOS}
    for silo, rows in local("regression").items():
        answer = regression.silo_logistic(rows, beta=beta)
        answer = {name: np.asarray(value) for name, value in answer.items()}
        words = encode_arrays(silo, answer)
        known[silo] = telling_bytes(words)[::20]
        known[silo] += [answer["information"].tobytes()[:24]]
        known[silo] += [repr(float(answer["loglik"])).encode()]
    for path in fleet.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            for silo, pieces in known.items():
                if any(piece in content for piece in pieces):
                    found[silo].add(path.relative_to(fleet.kits).parts[0])
    assert found == {silo: {silo.replace(" ", "-")} for silo in SILOS}
