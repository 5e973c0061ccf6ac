"""The job file: what it understands, what it refuses, and what it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from lorafleet.jobs import yaml12
from lorafleet.jobs.errors import JobFileError, UserError
from lorafleet.jobs.loading.job_file import build_json_schema, load_job, load_text
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.base import Spec, describe_fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.trial_id import Provenance, compute_trial_id
from tests.conftest import ROOT, JobMaker, lorafleet_here

EXAMPLES = sorted(
    [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "examples" / "studies").glob("*.yaml")]
)
BAD_JOBS = sorted((ROOT / "tests" / "bad" / "jobs").glob("*.yaml"))
MINIMAL = """
name: x
task: classification
model: {model_name_or_path: asset:minilm-l6}
data: {dataset_name: asset:rotten-tomatoes}
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_and_fits_the_schema(path: Path) -> None:
    loaded = load_job(path)
    assert loaded.notes == ()  # examples speak our own words
    Draft202012Validator(build_json_schema()).validate(
        yaml12.parse_document(path.read_text()).value
    )


@pytest.mark.parametrize("path", BAD_JOBS, ids=lambda path: path.stem)
def test_every_bad_job_file_gets_its_sentence(path: Path) -> None:
    expected = path.read_text().splitlines()[0].removeprefix("# expect: ")
    with pytest.raises(JobFileError) as caught:
        from lorafleet.cluster.planning.preflight import check_names

        check_names(load_job(path))
    assert expected in str(caught.value)
    assert all(line.startswith(f"{path}") for line in str(caught.value).splitlines())


def test_there_are_at_least_thirty_bad_files() -> None:
    from tests.unit.jobs.data.test_rows import BAD_DATA

    assert len(BAD_JOBS) + len(BAD_DATA) >= 30


def test_a_bad_file_ends_the_command_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    for command in ("validate", "sweep", "plan", "render"):
        done = lorafleet_here(command, BAD_JOBS[0], cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_every_field_has_a_sentence() -> None:
    def blocks(model: type[Spec]) -> list[type[Spec]]:
        inner = [fields._find_block(field.annotation) for field in model.model_fields.values()]
        return [model] + [deeper for block in inner if block for deeper in blocks(block)]  # type: ignore[arg-type]

    for block in blocks(JobSpec):
        for name in block.model_fields:
            assert describe_fields(block).get(name), f"{block.__name__}.{name} has no sentence"


def test_all_problems_are_reported_with_their_lines(tmp_path: Path) -> None:
    text = MINIMAL + "train: {seed: -1}\nlora: {lora_ranl: 8}\n"
    with pytest.raises(JobFileError) as caught:
        load_text(text, tmp_path / "job.yaml")
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/job.yaml:6: train.seed is -1, but must be at least 0",
        f"{tmp_path}/job.yaml:7: lora.lora_ranl is not a known key; did you mean 'lora_r'?",
    ]


def test_yaml_1_2_scalars() -> None:
    value = yaml12.parse_document(
        "a: 2e-4\nb: no\nc: 1:00:00\nd: 0o17\ne: 1_000\nf: '1'\ng: ~\nh: true\ni: 0x1f\nj: 017"
    ).value
    assert value == {"a": 2e-4, "b": "no", "c": "1:00:00", "d": 15, "e": "1_000", "f": "1", "g": None, "h": True,
                     "i": 31, "j": 17}  # fmt: skip


_TEXTS = st.text(max_size=8).filter(
    # PyYAML dumps some texts bare that are numbers to YAML 1.2, such as 0E0: what it wrote is not
    # what it was given
    lambda text: isinstance(yaml12.parse_scalar(text), str) or yaml.safe_dump(text)[0] in "'\""
)


@given(st.recursive(st.none() | st.booleans() | st.integers() | _TEXTS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
                    max_leaves=12))  # fmt: skip
def test_what_yaml_dumps_we_read(value: object) -> None:
    document = yaml12.parse_document(yaml.safe_dump({"root": value}))
    if "<<" not in json.dumps(value) and not document.problems:
        assert document.value == {"root": value}


def test_other_tools_words_are_understood_and_reported(tmp_path: Path) -> None:
    text = """
name: x
task: classification
base_model: asset:minilm-l6
sequence_len: 128
data: {dataset_name: asset:rotten-tomatoes}
lora_rank: 4
train: {num_epochs: 2, micro_batch_size: 8, lr: 1e-3}
search:
  metric: {name: eval_f1, goal: max}
  parameters: {learning_rate: {distribution: loguniform, min: 1e-5, max: 1e-3}, r: [4, 8]}
"""
    loaded = load_text(text, tmp_path / "job.yaml")
    job = loaded.job
    assert (job.model.max_length, job.lora.lora_r, job.train.num_train_epochs) == (128, 4, 2)
    assert (job.train.per_device_train_batch_size, job.train.learning_rate) == (8, 1e-3)
    assert set(job.search.parameters) == {"train.learning_rate", "lora.lora_r"}  # type: ignore[union-attr]
    assert job.metric.name == "f1"
    assert "line 5: sequence_len is read as model.max_length" in loaded.notes
    assert str(loaded.origins["lora.lora_r"]).startswith("alias")


@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        (
            "{distribution: log_uniform, min: -9.21, max: -4.6}",
            "is log_uniform, whose min and max W&B reads as exponents of e: write log_uniform_values with min: 0.0001, max: 0.0101, or log_uniform_values with min and max unchanged",
        ),
        (
            "{distribution: q_log_uniform, min: 1, max: 4, q: 1}",
            "write q_log_uniform_values with min: 3, max: 54, q: 1",
        ),
        ("8", "is 8, but must list the values to try: {values: [8]}"),
        ("", "is empty, but must list the values to try: {values: [...]}"),
        ("true", "is true, but must list the values to try: {values: [true]}"),
    ],
)
def test_a_parameter_that_says_something_else_is_refused_once(
    parameter: str, sentence: str, tmp_path: Path
) -> None:
    text = f"{MINIMAL}search: {{parameters: {{lora.lora_r: {parameter}}}}}\n"
    with pytest.raises(JobFileError) as caught:
        load_text(text, tmp_path / "job.yaml")
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1


def test_labels_that_are_numbers_fit_the_schema(tmp_path: Path) -> None:
    text = MINIMAL.replace("}\n", ", labels: [0, positive]}\n").replace(
        "l6, labels: [0, positive]}", "l6}"
    )
    Draft202012Validator(build_json_schema()).validate(yaml.safe_load(text))
    assert load_text(text, tmp_path / "job.yaml").job.data.labels == ("0", "positive")


@pytest.mark.parametrize(
    "block", ["early_terminate: {type: hyperband, eta: 4}", "scheduler: {eta: 4}", "eta: 4"]
)
def test_eta_is_understood_wherever_a_scheduler_is_described(block: str, tmp_path: Path) -> None:
    loaded = load_text(
        f"{MINIMAL}search: {{{block}, parameters: {{lora.lora_r: [4, 8]}}}}\n",
        tmp_path / "job.yaml",
    )
    assert loaded.job.search is not None
    assert loaded.job.search.scheduler.reduction_factor == 4
    assert any("eta is read as search.scheduler.reduction_factor" in note for note in loaded.notes)


def test_eta_beside_the_real_key_is_a_contradiction(tmp_path: Path) -> None:
    search = "search: {scheduler: {eta: 4, reduction_factor: 3}, parameters: {lora.lora_r: [4, 8]}}"
    with pytest.raises(
        JobFileError,
        match=r"scheduler\.eta means search\.scheduler\.reduction_factor, which is also set",
    ):
        load_text(f"{MINIMAL}{search}\n", tmp_path / "job.yaml")


def test_an_alias_beside_the_real_key_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"lora_rank means lora.lora_r, which is also set"):
        load_text(MINIMAL + "lora: {lora_r: 8, lora_rank: 4}\n", tmp_path / "job.yaml")


def test_overrides_win_and_say_so(tmp_path: Path) -> None:
    loaded = load_text(
        MINIMAL + "train: {seed: 1}\n", tmp_path / "job.yaml", ("train.seed=7", "lora.lora_r=4")
    )
    assert (loaded.job.train.seed, loaded.job.lora.lora_r) == (7, 4)
    assert loaded.get_resolved_values()["train.seed"] == {
        "value": 7,
        "origin": "override (train.seed=7)",
    }
    assert loaded.get_resolved_values()["train.max_grad_norm"]["origin"] == "default"


@pytest.mark.parametrize("spelt", ["lora.lora_r: 16", "lora.lora_rank: 16", "rank: 16"])
@pytest.mark.parametrize("override", ["lora.lora_r=4", "lora_rank=4", "lora.rank=4"])
def test_an_override_wins_however_either_is_spelt(
    tmp_path: Path, spelt: str, override: str
) -> None:
    block, _, key = spelt.rpartition(".")
    text = MINIMAL + (f"{block}: {{{key}}}\n" if block else f"{key}\n")
    loaded = load_text(text, tmp_path / "job.yaml", (override,))
    assert loaded.job.lora.lora_r == 4
    assert loaded.get_resolved_values()["lora.lora_r"]["origin"] == f"override ({override})"
    assert any("is read as lora.lora_r" in note for note in loaded.notes) is (
        "rank" in spelt + override
    )


def test_an_override_of_a_search_may_be_spelt_otherwise(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + "search: {metric: eval_f1, parameters: {lora_rank: [4, 8], lr: {min: 0.1, max: 0.2}}}\n"
    )
    loaded = load_text(
        text,
        tmp_path / "job.yaml",
        ("search.parameters.rank=[2, 3]", "search.parameters.lr=[1e-3]"),
    )
    assert loaded.job.search is not None
    assert {path: p.values for path, p in loaded.job.search.parameters.items()} == {
        "lora.lora_r": (2, 3), "train.learning_rate": (1e-3,),
    }  # fmt: skip
    assert loaded.job.metric.name == "f1"
    assert any("eval_f1 is read as f1" in note for note in loaded.notes)
    assert loaded.get_resolved_values()["search.metric.name"]["origin"].startswith("alias")


def test_relative_paths_start_at_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    text = MINIMAL.replace("dataset_name: asset:rotten-tomatoes", "train_file: rows.jsonl")
    loaded = load_text(text, tmp_path / "sub" / "job.yaml")
    assert loaded.job.data.train_file == str(tmp_path / "sub" / "rows.jsonl")


LINKED = """
lora: {lora_alpha: "2*lora_r"}
search:
  method: grid
  parameters:
    lora.lora_r: {values: [4, 8]}
    train.learning_rate: {values: [1e-3, 1e-2]}
    train.per_device_train_batch_size: "16 // lora_r * 4"
"""


def test_linked_values_follow_each_trial(tmp_path: Path) -> None:
    job = load_text(MINIMAL + LINKED, tmp_path / "job.yaml").job
    trials = [
        search.build_trial_job(job, assignment) for assignment in search.iterate_assignments(job)
    ]
    shown = [
        (t.lora.lora_r, t.lora.lora_alpha, t.train.per_device_train_batch_size) for t in trials
    ]
    assert shown == [(4, 8, 16), (4, 8, 16), (8, 16, 8), (8, 16, 8)]


def test_random_draws_come_from_the_seed_and_stay_inside(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + """
search:
  seed: 3
  parameters:
    train.learning_rate: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}
    lora.lora_r: {distribution: q_uniform, min: 4, max: 64, q: 4}
    lora.lora_dropout: {distribution: uniform, min: 0.0, max: 0.5}
    train.seed: {distribution: int_uniform, min: 1, max: 3}
"""
    )
    job = load_text(text, tmp_path / "job.yaml").job
    first = list(itertools.islice(search.iterate_assignments(job), 50))
    assert first == list(itertools.islice(search.iterate_assignments(job), 50))
    assert all(1e-4 <= a["train.learning_rate"] <= 1e-2 for a in first)  # type: ignore[operator]
    assert {a["lora.lora_r"] for a in first} <= set(range(4, 65, 4))
    assert {a["train.seed"] for a in first} == {1, 2, 3}
    for assignment in first:
        search.build_trial_job(job, assignment)


RATES = {"lora": 1e-3, "full": 5e-5, "prompt_tuning": 3e-2, "qlora": 1e-3}
FACTS = Provenance({"train": "aa", "validation": "bb"}, {"asset:minilm-l6": "cc"}, RATES)


def _id(extra: str = "", facts: Provenance = FACTS, **overrides: object) -> str:
    from tests.conftest import as_overrides

    return compute_trial_id(
        load_text(MINIMAL + extra, Path("job.yaml"), as_overrides(overrides)).job, facts
    )


def test_a_trials_id_depends_on_what_changes_its_weights_and_nothing_else() -> None:
    same = _id()
    unchanged: list[dict[str, object]] = [
        {"name": "other"}, {"train__max_steps": 7}, {"train__num_train_epochs": 9}, {"tracking__project": "p"},
        {"train__eval_steps": 3}, {"resources__cpus_per_worker": 4}, {"train__per_device_eval_batch_size": 2},
        {"train__per_device_train_batch_size": 8, "train__gradient_accumulation_steps": 2},
        {"resources__workers_per_node": 2, "train__per_device_train_batch_size": 8}, {"train__learning_rate": 1e-3},
    ]  # fmt: skip
    for overrides in unchanged:
        assert _id(**overrides) == same, overrides
    changed: list[dict[str, object]] = [
        {"train__seed": 1}, {"lora__lora_r": 8}, {"train__learning_rate": 2e-3}, {"model__max_length": 64},
        {"data__max_train_samples": 10}, {"train__per_device_train_batch_size": 8}, {"train__weight_decay": 0.1},
    ]  # fmt: skip
    for overrides in changed:
        assert _id(**overrides) != same, overrides
    assert (
        _id(facts=Provenance({"train": "zz", "validation": "bb"}, {"asset:minilm-l6": "cc"}, RATES))
        != same
    )
    assert (
        _id(facts=Provenance({"train": "aa", "validation": "bb"}, {"asset:minilm-l6": "zz"}, RATES))
        != same
    )


def test_configurations_that_train_alike_are_tried_once(bert_job: JobMaker) -> None:
    job = bert_job("search: {num_samples: 20, parameters: {lora.lora_r: {values: [4, 8]}}}").job
    found = search.list_planned_assignments(job, lambda assignment: str(assignment))
    assert len(found) == 2


def test_trust_remote_code_needs_a_commit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="40 hex digits"):
        load_text(
            MINIMAL.replace("minilm-l6}", "minilm-l6, trust_remote_code: true, revision: main}"),
            tmp_path / "j",
        )


def test_environment_of_a_foreign_package_does_not_matter_to_the_control_plane(
    tmp_path: Path,
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise SystemExit('foreign')")
    (tmp_path / "ok.yaml").write_text(MINIMAL)
    assert lorafleet_here("validate", "ok.yaml", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("extra", "overrides", "sentence"),
    [
        (
            "search: {parameters: {train.num_train_epochs: [1, 2]}}",
            (),
            "is the budget of a trial: use search.scheduler",
        ),
        (
            "search: {parameters: {model.max_length: [32, 64]}}",
            (),
            "all trials share one tokenization of the rows",
        ),
        (
            "search: {parameters: {lora.lora_r: {distribution: uniform, min: 4, max: 32}}}",
            (),
            "use int_uniform",
        ),
        ("lora: {lora_alpha: 'min(lora_r)'}", (), "cannot be computed"),
        (
            "lora: {lora_target_modules: []}",
            (),
            "must be all-linear or a non-empty list of layer names",
        ),
        (
            "lora: {lora_target_modules: ''}",
            (),
            "must be all-linear or a non-empty list of layer names",
        ),
        ("linked: {data.max_train_samples: '10*lora_r'}", (), "but must be a fixed value"),
        ("tracking: {base_url: 'https://user:secret@host'}", (), "tracking.base_url"),
        ("data2: {x: 1}\ndataset: {path: x}", (), "data"),
        ("base_model: {x: 1}", (), "base_model means model.model_name_or_path"),
        ("search: []", ("search.parameters.lora.lora_r=[1, 0]",), "lora.lora_r is 0"),
        ("search:", ("search.parameters.lora.lora_r=[1, 0]",), "lora.lora_r is 0"),
        ("lora: {lora_r: 8}", ("lora.lora_r=0",), "override 'lora.lora_r=0': lora.lora_r is 0"),
        ("", ("train=3",), "train is 3, but must be a block of keys"),
        ("", ("=5",), "must be of the form key=value"),
        ("early_terminate: {type: hyperband}", (), "search"),
    ],
)
def test_odd_files_get_sentences_and_not_tracebacks(
    extra: str, overrides: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(JobFileError) as caught:
        load_text(MINIMAL + extra + "\n", tmp_path / "job.yaml", overrides)
    assert sentence in str(caught.value)


def test_names_of_layers_may_be_one_text(tmp_path: Path) -> None:
    job = load_text(
        MINIMAL + "lora: {lora_target_modules: 'query, value'}\n", tmp_path / "job.yaml"
    ).job
    assert job.lora.lora_target_modules == ("query", "value")
