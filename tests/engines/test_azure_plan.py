"""Plans of all kinds of runs keep the table of flows, which is written here again."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_helpers.cross_silo.azure_ml import explain, pipeline, plan, snapshot
from fl_helpers.training import norm_entries

from . import azure_trial, hospital

NAMES = ("Hospital A", "Hospital B", "Hospital C", "Klinik 4-b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@st.composite
def descriptions(draw):
    """(content of a silos.yaml, what is said of the run and the part)."""
    names = NAMES[: draw(st.integers(2, 4))]
    content, model = azure_trial.content(names), azure_trial.model()
    if draw(st.booleans()):
        content["azure_ml"]["prepare"] = f"{hospital.__file__}:prepare"
    for silo in content["silos"]:
        own = silo["azure_ml"]
        if draw(st.booleans()):
            own["outbox"] = f"updates_{own['datastore']}"
        if draw(st.booleans()):
            own["data"] = "azureml:radiographs:3"
    said = {"rounds": draw(st.integers(1, 3)), "evaluate": draw(st.booleans())}
    if draw(st.booleans()):
        said["keep_local"] = norm_entries(model)
    if draw(st.booleans()):
        names_ = [name for name, _ in model.named_parameters()]
        said |= {"aggregate": "FedAdam", "trainable": names_}
    first = draw(st.integers(0, said["rounds"] - 1))
    if first:
        said |= {"start": ("before", first), "part_name": "after"}
        said["kept"] = {names[0]: ("older", first - 1)}
        said["final"] = draw(st.booleans())
    if len(names) > 2 and draw(st.booleans()):
        said["silos"] = frozenset(names[1:])
        said |= {"part_name": "after"}
    return content, said


def may_read(party, flow, maker, main):
    if flow.store == "":
        return party != main and flow.name == "data"
    if party == main:
        return flow.path.startswith("fl/") and flow.store not in (
            f"{silo.lower().replace(' ', '_').replace('-', '_')}" for silo in NAMES
        )
    if flow.store == main.datastore:
        return flow.path.startswith("fl/models/") and maker in (None, main)
    return flow.store == party.datastore and maker in (None, party)


def may_write(party, flow, main):
    own = flow.store == party.datastore and flow.path.startswith("fl/")
    if party == main or flow.name not in ("model_update", "scores"):
        return own and not flow.path.startswith("fl/updates/")
    return flow.store == party.outbox and flow.path.startswith(
        f"fl/updates/{party.key}/"
    )


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(description=descriptions())
def test_every_flow_of_every_plan_is_in_the_table(description, folder):
    content, said = description
    fed = azure_trial.read(folder, content)
    made = azure_trial.build(fed, azure_trial.model().state_dict(), folder, **said)
    main, makers = fed.azure_ml.orchestrator, {j.name: j.party for j in made.jobs}
    done, written, readers = set(), [], []
    for job in made.jobs:
        for flow in job.reads:
            assert flow.producer in ("", *done), "it does not wait"
            assert may_read(job.party, flow, makers.get(flow.producer), main), flow
            readers.append((flow.producer, flow.output))
        for flow in job.writes:
            assert may_write(job.party, flow, main), (job.name, flow)
            written.append((f"{flow.store}/{flow.path}/", (job.name, flow.name)))
        if job.kind in ("aggregate", "collect"):
            step = "scores" if job.kind == "collect" else f"{job.literals['round']:04d}"
            gathered = [f for f in job.reads if f.name.startswith("update_")]
            assert [f.name for f in gathered] == [f"update_{s.key}" for s in made.silos]
            for flow, silo in zip(gathered, made.silos, strict=True):
                assert flow.path == f"fl/updates/{silo.key}/{made.name}/{step}"
        if job.party != main:
            assert job.literals["silo"] == job.party.key
        done.add(job.name)
    for place, maker in written:
        others = [p for p, m in written if m != maker]
        assert not any(p.startswith(place) or place.startswith(p) for p in others)
        if "/fl/updates/" in place:
            assert readers.count(maker) == 1, "one job gathers each update, once"
        for job in made.jobs:  # what is written here is read by waiting only
            for flow in (f for f in job.reads if not f.producer):
                found = f"{flow.store}/{flow.path}/"
                assert not found.startswith(place) and not place.startswith(found)
    check_commands(made)


def check_commands(made):
    """One command of each kind; each slot behind its own name; nothing for a shell."""
    for kind in {job.kind for job in made.jobs}:
        lines = {job.command for job in made.jobs if job.kind == kind}
        assert len(lines) == 1
        (line,) = lines
        head = rf"python -B start\.py {made.codes[job_code(made, kind)]} {kind}\.py "
        assert re.match(head, line)
        slot = re.compile(r"(?:--|=)?\$\{\{(inputs|outputs)\.(\w+)\}\}")
        words = line.split()
        assert not re.search(r"[;|&<>()`'\"\\*?]", slot.sub("", line))
        for before, word in zip(words, words[1:], strict=False):
            if found := re.fullmatch(r"\$\{\{\w+\.(\w+)\}\}", word):
                assert before == f"--{found[1]}"
            elif found := re.fullmatch(r"(\w+)=\$\{\{inputs\.update_(\w+)\}\}", word):
                assert found[1] == found[2]
        job = next(job for job in made.jobs if job.kind == kind)
        slots = {name for _, name in slot.findall(line)}
        assert slots == {*job.literals, *(f.name for f in (*job.reads, *job.writes))}


def job_code(made, kind):
    return next(job.code for job in made.jobs if job.kind == kind)


# ---- what people look at


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("plan"), azure_trial.model()
    content = azure_trial.content()
    content["azure_ml"] |= {"prepare": f"{hospital.__file__}:prepare", "hours": 2}
    fed = azure_trial.read(folder, content)
    keep = norm_entries(model)
    return azure_trial.build(fed, model.state_dict(), folder, keep_local=keep)


def test_the_explanation_says_what_leaves_whom_and_how_much(made):
    found = explain.explain_plan(made)
    row = found.rows[1]
    assert row["silo"] == "Hospital B" and row["runs on"] == "hospital-b"
    prepared = "hospital_b: fl/prepared/trial/data, hospital_b: radiographs"
    assert row["reads of its own"] == f"hospital_b: fl/kept/trial/, {prepared}"
    assert row["reads of others"] == "orchestrator: fl/models/trial/"
    assert row["leaves"] == "2 x model_update, 1 x scores"
    kept = set(norm_entries(azure_trial.model()))
    state = azure_trial.model().state_dict()
    sent = {name: value for name, value in state.items() if name not in kept}
    size = 1024 + sum(v.nbytes + 256 + 6 * len(k) for k, v in sent.items())
    assert row["bytes at most"] == f"{size:,} each, {2 * size + 1024:,} in all"
    assert row["to"] == "orchestrator: fl/updates/hospital_b/trial/"
    assert row["machine hours at most"] == 4 * 2  # prepare, train twice, evaluate
    for text in ("Hospital C", made.digest, *made.codes.values(), snapshot.IMAGE):
        assert text in found.markdown
    for job in made.jobs:
        assert f"`{job.command}`" in found.markdown
    assert "mlflow" not in found.markdown.split("environment `orchestrator`")[0]


def test_the_explanation_is_of_the_plan_only(made):
    from dataclasses import replace

    with pytest.raises(plan.PlanRefused):
        explain.explain_plan(replace(made, jobs=made.jobs[:-1]))


def test_the_digest_changes_with_all_that_is_agreed(made, tmp_path):
    """And with nothing else: built again, elsewhere, it is the same."""
    model = azure_trial.model()
    params, keep = model.state_dict(), norm_entries(model)

    def digest(content=None, **more):
        content = content or azure_trial.content()
        content["azure_ml"] |= {"prepare": f"{hospital.__file__}:prepare"}
        content["azure_ml"].setdefault("hours", 2)
        fed = azure_trial.read(tmp_path, content)
        more = {"keep_local": keep} | more
        return azure_trial.build(fed, params, tmp_path, **more).digest

    assert digest() == made.digest
    changes = [{"seed": 1}, {"rounds": 3}, {"settings": {"lr": 1}}, {"name": "x"}]
    found = {digest(**change) for change in changes}
    for place, value in (("compute", "other"), ("data", "more"), ("outbox", "box_a")):
        content = azure_trial.content()
        content["silos"][0]["azure_ml"][place] = value
        found.add(digest(content))
    content = azure_trial.content()
    content["azure_ml"] |= {"hours": 3}
    found.add(digest(content))
    content = azure_trial.content()
    content["azure_ml"]["environment"] = "azureml:fl:1"
    found.add(digest(content))
    assert len(found | {made.digest}) == len(changes) + 3 + 2 + 1


def test_the_picture_has_a_lane_for_each_party_and_every_job(made):
    import matplotlib.pyplot as plt

    figure = explain.draw_plan(made)
    texts = [text.get_text() for text in figure.axes[0].texts]
    for name in ("orchestrator", "Hospital A", "Hospital B", "Hospital C"):
        assert texts.count(name) == 1
    assert sum(text.startswith("train") for text in texts) == 6
    plt.close(figure)


def test_all_that_differs_is_told_at_once(made):
    from dataclasses import replace

    jobs = [replace(job, literals={}) for job in made.jobs]
    with pytest.raises(plan.PlanRefused) as refused:
        pipeline.check_plan(replace(made, jobs=tuple(jobs)))
    assert len(refused.value.violations) == len(jobs) - 1  # initial is told nothing
    short = str(refused.value).count("\n- ")
    assert short == min(20, len(jobs) - 1) + (len(jobs) > 21)
    many = plan.PlanRefused(
        [plan.Violation("a job", "it", "x", str(n)) for n in range(23)]
    )
    assert str(many).endswith("says 19\n- and 3 more (.violations)")
