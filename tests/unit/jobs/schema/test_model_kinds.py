"""Kinds of models: what their configs say is what they do, and what does not fit a task is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.planning.preflight import check_names
from lorafleet.jobs.errors import AssetError, JobFileError, UserError
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.schema import model_kinds
from lorafleet.jobs.schema.model_kinds import (
    CAUSAL_TYPES,
    DECODER_IF_CONFIGURED,
    ENCODER_DECODERS,
    get_generation_refusal,
    get_max_positions,
    has_tied_embeddings,
    is_causal,
)
from lorafleet.jobs.sites.base import LocalSite
from lorafleet.jobs.trials.arms import build_arm_job
from lorafleet.training.data import make_batch, prepare_tokens
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.methods import attach, load_weights
from lorafleet.training.model import load_base
from tests.conftest import JobMaker, lorafleet_here, write_rows
from tests.unit.tiny_models import save_tiny, tiny_config
from tests.unit.training.test_session import CPU, finish, session

NOT_CAUSAL_TEXT = {
    **dict.fromkeys(
        ("whisper", "moshi", "trocr", "git", "got_ocr2", "moss_transcribe_diarize"),
        "not text alone",
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "writes sounds"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model"),
    **dict.fromkeys(("cpmant", "xlm", "xlnet"), "sees what comes after"),
}
"""What transformers loads as a causal LM and is none for the tasks here, with why."""


def test_every_causal_type_of_transformers_is_in_a_table() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LOADED

    assert set(LOADED) - CAUSAL_TYPES - DECODER_IF_CONFIGURED == set(NOT_CAUSAL_TEXT)
    assert not CAUSAL_TYPES & (DECODER_IF_CONFIGURED | ENCODER_DECODERS | set(NOT_CAUSAL_TEXT))


CAUSAL = (
    *(
        "gpt2",
        "gpt_neo",
        "gptj",
        "gpt_neox",
        "gpt_bigcode",
        "openai-gpt",
        "opt",
        "bloom",
        "mpt",
        "codegen",
        "biogpt",
    ),
    *(
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
    ),
    *(
        "olmo2",
        "smollm3",
        "stablelm",
        "starcoder2",
        "cohere",
        "falcon",
        "granite",
        "glm4",
        "mamba",
        "ctrl",
        "xglm",
    ),
)
IF_SAID = ("bert", "roberta", "electra", "camembert", "bart", "pegasus")


def _sees_what_follows(model: Any) -> bool:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    other = ids.clone()
    other[0, -1] = 50
    with torch.no_grad():
        one, two = model(input_ids=ids).logits, model(input_ids=other).logits
    assert not torch.allclose(one[:, -1], two[:, -1])
    return not torch.allclose(one[:, :-1], two[:, :-1], atol=1e-5)


@pytest.mark.parametrize("kind", [*CAUSAL, *IF_SAID])
def test_what_is_called_causal_sees_only_what_stands_before(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    for is_decoder in (True, False) if kind in IF_SAID else (None,):
        said = {} if is_decoder is None else {"is_decoder": is_decoder, "is_encoder_decoder": False}
        config = tiny_config(kind, **said)
        torch.manual_seed(0)
        sees = _sees_what_follows(AutoModelForCausalLM.from_config(config).eval())
        if is_causal(config.to_dict()):
            assert not sees
        assert is_causal(config.to_dict()) or is_decoder is False
        assert (get_generation_refusal(config.to_dict(), "x") is None) == is_causal(
            config.to_dict()
        )


_OTHER_INPUTS = {
    *(
        "perceiver",
        "canine",
        "prophetnet",
        "lilt",
        "layoutlmv3",
        "big_bird",
        "longformer",
        "xmod",
        "trocr",
    ),
}
"""Types of tables that want other inputs than a few tokens."""


@pytest.mark.parametrize(
    "kind", sorted((model_kinds._POSITION_TABLES | model_kinds._ROBERTA_LIKE) - _OTHER_INPUTS)
)
def test_learnt_positions_are_those_that_the_model_has(kind: str) -> None:
    """One more token than that is an error of the model's own, and so many are not."""
    import transformers

    try:
        pad = {"pad_token_id": 1} if kind in model_kinds._ROBERTA_LIKE else {}
        config = tiny_config(kind, positions=16, max_seq_len=16, **pad)
        auto = "AutoModelForCausalLM" if kind in CAUSAL_TYPES | ENCODER_DECODERS else "AutoModel"
        model = getattr(transformers, auto).from_config(config).eval()
    except (ValueError, RuntimeError, ImportError, KeyError) as error:
        pytest.skip(f"no tiny {kind}: {str(error)[:80]}")
    most = get_max_positions(config.to_dict())

    def reads(tokens: int) -> bool:
        try:
            with torch.no_grad():
                model(
                    input_ids=torch.full((1, tokens), 7),
                    attention_mask=torch.ones(1, tokens, dtype=torch.long),
                )
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    assert 0 < most <= 16
    assert reads(most)
    assert not reads(most + 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_neox", "falcon", "mamba"])
def test_worked_out_positions_have_no_end(kind: str) -> None:
    assert get_max_positions(tiny_config(kind).to_dict()) == 0


def test_usual_positions_and_ties_are_transformers_defaults() -> None:
    from transformers import CONFIG_MAPPING

    for kind in model_kinds._POSITION_TABLES | model_kinds._ROBERTA_LIKE:
        config = CONFIG_MAPPING[kind]().to_dict()
        said = next(config[name] for name in model_kinds._POSITION_FIELDS if config.get(name))
        assert model_kinds._DEFAULT_POSITIONS[kind] == said, kind
    for kind in CAUSAL_TYPES:
        config = CONFIG_MAPPING[kind]().get_text_config()
        if hasattr(config, "tie_word_embeddings"):
            assert has_tied_embeddings({"model_type": kind}) == bool(config.tie_word_embeddings), (
                kind
            )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "bert"},
            "encoder (bert without is_decoder: true), so its tokens see the answer",
        ),
        ({"model_type": "roberta", "is_decoder": False}, "so its tokens see the answer"),
        ({"model_type": "t5"}, "encoder-decoder (t5)"),
        ({"model_type": "bart"}, "encoder-decoder (bart)"),
        (
            {"model_type": "new", "is_encoder_decoder": True, "architectures": ["NewForCausalLM"]},
            "encoder-decoder",
        ),
        ({"model_type": "distilbert"}, "of type distilbert, which is not a causal decoder"),
        (
            {"model_type": "new", "architectures": ["NewModel"]},
            "of type new, which is not a causal decoder",
        ),
        ({"model_type": "new", "architectures": ["NewForCausalLM"]}, None),
        ({"model_type": "bart", "is_decoder": True, "is_encoder_decoder": False}, None),
        ({"model_type": "qwen3"}, None),
    ],
)
def test_what_cannot_write_is_refused(config: dict[str, Any], words: str | None) -> None:
    sentence = get_generation_refusal(config, "some/model")
    assert (sentence is None) if words is None else (sentence is not None and words in sentence)


def test_an_encoder_is_refused_for_generation_before_anything_starts(
    llama_job: JobMaker, tiny_bert: Path
) -> None:
    loaded = llama_job(model__model_name_or_path=str(tiny_bert))
    with pytest.raises(
        JobFileError, match=r"line 4|job\.yaml.*tokens see the answer that they predict"
    ):
        check_names(loaded)
    with pytest.raises(UserError, match="tokens see the answer that they predict"):
        load_base(loaded.job, 0, CPU)


ENCODERS = (
    *(
        "bert",
        "roberta",
        "distilbert",
        "electra",
        "albert",
        "deberta-v2",
        "mpnet",
        "xlm-roberta",
        "modernbert",
    ),
    *("squeezebert", "mobilebert", "big_bird", "rembert", "flaubert", "camembert"),
)
DECODERS = (
    *(
        "gpt2",
        "gpt_neo",
        "gptj",
        "opt",
        "bloom",
        "llama",
        "mistral",
        "qwen3",
        "gemma2",
        "phi3",
        "mixtral",
    ),
    *("gpt_neox", "falcon", "ctrl", "openai-gpt"),
)


ALWAYS = {
    ("bert", 0),
    ("deberta-v2", 0),
    ("modernbert", 0),
    *product(("gpt2", "llama", "qwen3"), [0, 5, None]),
}
KINDS = [
    pytest.param(*pair, marks=[] if pair in ALWAYS else [pytest.mark.long])
    for pair in (*product(ENCODERS, [0]), *product(DECODERS, [0, 5, None]))
]


@pytest.mark.parametrize(("kind", "pad"), KINDS)
def test_a_class_does_not_depend_on_the_batch(
    kind: str, pad: int | None, bert_job: JobMaker, tmp_path: Path
) -> None:
    """The config of a decoder may have another padding id than the tokenizer, or none; an encoder
    does not look.
    """
    folder = save_tiny(tmp_path / "model", kind, pad_token_id=pad)
    job = bert_job(model__model_name_or_path=str(folder)).job
    data = prepare_tokens(job)
    base = load_base(job, 2, CPU)
    model = attach(job, base)
    results = []
    for rows in (1, 8, 32):
        train = job.train.model_copy(update={"per_device_eval_batch_size": rows})
        results.append(
            evaluate_rows(model, job.model_copy(update={"train": train}), data, "validation", CPU)
        )
    for result in results[1:]:
        assert result.loss_R == pytest.approx(results[0].loss_R, abs=2e-5)
        assert result.classified.predicted_R.tolist() == results[0].classified.predicted_R.tolist()


@pytest.mark.parametrize("kind", sorted(model_kinds._PADDING_SENSITIVE_TYPES))
def test_a_model_that_reads_padding_is_refused(
    kind: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    word = {"model_type": kind}
    assert "padding" in str(model_kinds.get_classification_refusal(word, "x"))


@pytest.mark.parametrize(
    "kind", ["distilbert", "deberta-v2", "bert", "modernbert", "roberta", "gpt2", "flaubert"]
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_plain_peft_says_the_same_though_the_checkpoint_lacked_weights(
    kind: str, method: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    """What was drawn anew (a pooler, a head's inner layer) is saved: elsewhere it would be drawn
    otherwise.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder = save_tiny(tmp_path / "model", kind)
    if kind == "bert":  # as a checkpoint of a masked LM is: without a pooler
        from transformers import BertForMaskedLM

        BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    job = bert_job(model__model_name_or_path=str(folder), method=method, train__max_steps=12).job
    made = session(job)
    finish(made)
    made.save_weights(tmp_path / "weights")
    data = prepare_tokens(job)
    rows = data.splits["test"].lengths.argsort()[:16]
    batch = make_batch(data.splits["test"], rows, data.pad_id, CPU, classifies=True)
    with torch.inference_mode():
        expected = made.model.eval()(**batch.inputs).logits
    torch.manual_seed(1234)
    if method == "full":
        plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "weights")
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        plain.config.pad_token_id = data.pad_id
        plain = PeftModel.from_pretrained(plain, str(tmp_path / "weights"))
    with torch.inference_mode():
        assert torch.allclose(plain.eval()(**batch.inputs).logits, expected, atol=2e-5)


def test_a_pooler_that_the_checkpoint_lacks_is_not_quantised(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = save_tiny(tmp_path / "model", "deberta-v2")
    quantised = {"method": "qlora", "qlora__quant_type": "int8"}
    made = session(bert_job(model__model_name_or_path=str(folder), **quantised).job)
    finish(made)
    made.save_weights(tmp_path / "weights")
    saved = load_file(str(tmp_path / "weights" / "adapter_model.safetensors"))
    assert saved["base_model.model.pooler.dense.weight"].shape == (32, 32)
    made.close()
    packed = save_tiny(tmp_path / "packed", "eurobert")
    with pytest.raises(
        UserError, match=r"no weights for dense of EuroBert.*cannot be quantised; use lora"
    ):
        load_base(bert_job(model__model_name_or_path=str(packed), **quantised).job, 2, CPU)


def test_what_was_drawn_for_one_trial_is_not_the_next_ones(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "deberta-v2")
    job = bert_job(model__model_name_or_path=str(folder)).job
    base = load_base(job, 2, CPU)
    assert base.drawn == ("pooler",)
    losses = []
    for _ in range(2):
        made = session(job, base)
        finish(made)
        losses.append(made.evaluate("validation").metrics["loss"])
        made.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("classes", [3, 5])
def test_a_head_of_other_classes_is_drawn_anew_and_said(
    classes: int, bert_job: JobMaker, tmp_path: Path
) -> None:
    names = {"id2label": {number: f"class {number}" for number in range(classes)}}
    folder = save_tiny(tmp_path / "model", "bert", "AutoModelForSequenceClassification", **names)
    loaded = bert_job(model__model_name_or_path=str(folder))
    check_names(loaded)
    base = load_base(loaded.job, 2, CPU)
    assert not base.own_head
    assert base.model.classifier.weight.shape[0] == 2
    note = f"has a classification head for {classes} classes, but the rows have 2: a new head is initialised"
    assert any(note in warning for warning in prepare_tokens(loaded.job).warnings)
    finish(session(loaded.job, base))


def test_a_checkpoint_without_an_output_head_is_refused(
    llama_job: JobMaker, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")  # AutoModel: no lm_head
    with pytest.raises(
        AssetError, match=r"lm_head\.weight of LlamaForCausalLM is missing from its files"
    ):
        load_base(llama_job(model__model_name_or_path=str(folder)).job, 0, CPU)


def test_a_checkpoint_without_a_layer_is_refused(bert_job: JobMaker, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        AssetError, match=r"bert\.encoder\.layer\.2\..* and \d+ more .* is missing from its files"
    ):
        load_base(bert_job(model__model_name_or_path=str(folder)).job, 2, CPU)


@pytest.mark.parametrize(
    ("kind", "most"), [("bert", 64), ("roberta", 62), ("mpnet", 62), ("gpt2", 64), ("opt", 64)]
)
def test_rows_longer_than_the_positions_are_refused(
    kind: str, most: int, bert_job: JobMaker, tmp_path: Path
) -> None:
    pad = {"pad_token_id": 1} if kind in ("roberta", "mpnet") else {}
    folder = save_tiny(tmp_path / "model", kind, **pad)
    check_names(bert_job(model__model_name_or_path=str(folder), model__max_length=most))
    with pytest.raises(
        JobFileError,
        match=f"has only {most} learnt positions: set model.max_length to at most {most}",
    ):
        check_names(bert_job(model__model_name_or_path=str(folder), model__max_length=most + 1))
    if kind in ("gpt2", "opt"):
        return  # as a classifier it takes no learnt prompt at all
    prompt = {"method": "prompt_tuning", "prompt_tuning__num_virtual_tokens": 10}
    check_names(
        bert_job(model__model_name_or_path=str(folder), model__max_length=most - 10, **prompt)
    )
    with pytest.raises(JobFileError, match=f"has only {most} positions for both together"):
        check_names(
            bert_job(model__model_name_or_path=str(folder), model__max_length=most - 9, **prompt)
        )


def test_what_is_searched_and_an_arm_are_looked_at(bert_job: JobMaker) -> None:
    search = (
        "search: {method: grid, parameters: {lora.lora_target_modules: {values: [query, no_such]}}}"
    )
    with pytest.raises(
        JobFileError, match=r"job\.yaml:\d+: lora\.lora_target_modules has 'no_such'"
    ):
        check_names(bert_job(search))
    arms = (
        "compare: {arms: {short: {method: lora}, long: {method: lora, set: {model.max_length: "
        "128}}}}"
    )
    with pytest.raises(JobFileError, match=r"compare\.arms\.long: model\.max_length is 128"):
        check_names(bert_job(arms))


def test_layers_that_the_model_does_not_have(bert_job: JobMaker, llama_job: JobMaker) -> None:
    names = {"lora__lora_target_modules": ["query", "v_prog"]}
    with pytest.raises(
        JobFileError, match=r"has 'v_prog', but .* has no such layer; it has dense, key"
    ):
        check_names(bert_job(**names))
    with pytest.raises(
        UserError, match=r"has 'v_prog', but BertForSequenceClassification has no such layer"
    ):
        attach(bert_job(**names).job, load_base(bert_job().job, 2, CPU))
    near = {"lora__lora_target_modules": ["q_proj", "v_prog"]}
    with pytest.raises(JobFileError, match="did you mean 'v_proj'"):
        check_names(llama_job(**near))
    check_names(
        llama_job(
            lora__lora_target_modules=["self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"]
        )
    )


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_matrix_that_is_head_and_embedding_gets_no_adapter(
    name: str, llama_job: JobMaker, tmp_path: Path
) -> None:
    folder = save_tiny(
        tmp_path / "model", "llama", "AutoModelForCausalLM", tie_word_embeddings=True
    )
    job = llama_job(
        model__model_name_or_path=str(folder), lora__lora_target_modules=["q_proj", name]
    )
    with pytest.raises(
        JobFileError,
        match=f"has {name}, but the embeddings and the output head .* share one matrix",
    ) as refused:
        check_names(job)
    assert "has no such layer" not in str(refused.value)  # one sentence for one fault
    with pytest.raises(UserError, match="share one matrix"):
        attach(job.job, load_base(job.job, 0, CPU))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_head_of_its_own_is_merged_right(name: str, llama_job: JobMaker, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(
        tmp_path / "model", "llama", "AutoModelForCausalLM", tie_word_embeddings=False
    )
    job = llama_job(
        model__model_name_or_path=str(folder),
        lora__lora_target_modules=["q_proj", name],
        train__max_steps=12,
    )
    check_names(job)
    made = session(job.job)
    finish(made)
    ids = torch.arange(4, 20).unsqueeze(0)
    with torch.no_grad():
        expected = made.model.eval()(input_ids=ids).logits
    made.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=2e-5)


def test_init_writes_a_length_that_the_model_has(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [{"text": f"it is good {number}", "label": number % 2} for number in range(40)]
    write_rows(tmp_path / "x.jsonl", rows)
    done = lorafleet_here(
        "init", "--train-file", "x.jsonl", "--model", str(tiny_bert), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "max_length: 64 " in (tmp_path / "job.yaml").read_text()


def _adapter(folder: Path, base: Path, auto: str = "AutoModelForCausalLM", **config: Any) -> Path:
    import transformers
    from peft import LoraConfig, get_peft_model

    kind = "CAUSAL_LM" if "Causal" in auto else "SEQ_CLS"
    model = getattr(transformers, auto).from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type=kind, **config)).save_pretrained(folder)
    return folder


def test_an_adapter_that_is_continued_says_its_rank_alpha_and_layers(
    llama_job: JobMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    plain = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "lora_dropout": 0.1,
        "use_rslora": True,
    }
    adapter = _adapter(tmp_path / "r4", tiny_llama, **plain)
    text = llama_job().text.replace("lora: {lora_r: 4}\n", "")
    loaded = load_text(text, tmp_path / "job.yaml", (f"train.init_adapter={adapter}",))
    lora = loaded.job.lora
    assert (lora.lora_r, lora.lora_alpha, lora.lora_target_modules) == (4, 4.0, ("q_proj",))
    assert (lora.use_rslora, lora.use_dora, lora.lora_dropout) == (True, False, 0.1)
    assert str(loaded.origins["lora.lora_r"]) == "derived (from train.init_adapter)"
    planned = (
        make_plan(loaded, LocalSite(cpus=2, memory_gib=8.0), "train").trials[0].resolved["lora"]
    )
    assert (planned["lora_r"], planned["lora_alpha"], planned["lora_target_modules"]) == (
        4,
        4.0,
        ["q_proj"],
    )
    changed = load_text(
        text, tmp_path / "job.yaml", (f"train.init_adapter={adapter}", "lora.lora_dropout=0.3")
    )
    made = session(changed.job)
    config = made.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 4, 0.3)
    assert {
        module.p
        for name, module in made.model.named_modules()
        if name.endswith("lora_dropout.default")
    } == {0.3}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"lora__lora_r": 16}, "lora.lora_r is 16, but the adapter of train.init_adapter has 4"),
        (
            {"lora__lora_alpha": "4*lora_r"},
            "lora.lora_alpha is 4*lora_r, but the adapter of train.init_adapter has 8",
        ),
        (
            {"lora__lora_target_modules": "all-linear"},
            "but the adapter of train.init_adapter has q_proj, v_proj",
        ),
        (
            {"lora__use_dora": True},
            "lora.use_dora is true, but the adapter of train.init_adapter has false",
        ),
        (
            {"search__parameters": {"lora.lora_r": {"values": [4, 8]}}},
            "in the adapter of train.init_adapter, so it cannot be searched",
        ),
        (
            {"search__parameters": {"train.init_adapter": {"values": ["a", "b"]}}},
            "train.init_adapter cannot be searched",
        ),
        (
            {"compare": {"arms": {"x": {"method": "lora", "parameters": {"lora.lora_r": [4, 8]}}}}},
            "so it cannot be searched",
        ),
        ({"lora__lora_target_modules": "v_proj, q_proj"}, None),
        ({"lora__lora_r": 4}, None),
        ({"lora__lora_alpha": "2*lora_r"}, None),
    ],
)
def test_what_an_adapter_fixes_cannot_be_set_or_searched(
    overrides: dict[str, Any],
    words: str | None,
    llama_job: JobMaker,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    adapter = _adapter(
        tmp_path / "r4", tiny_llama, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    own = {"train__init_adapter": str(adapter)} | overrides
    if words is None:
        llama_job(**own)
        return
    with pytest.raises(JobFileError) as error:
        llama_job(**own)
    assert words in str(error.value)


def test_an_arms_own_adapter_fixes_what_the_arm_trains(
    llama_job: JobMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = _adapter(tmp_path / "r2", tiny_llama, r=2, lora_alpha=8, target_modules=["q_proj"])
    arms = (
        "compare: {arms: {new: {method: lora}, old: {method: lora, set: {train.init_adapter: "
        f"{adapter}}}}}}}}}"
    )
    job = llama_job(arms).job
    assert build_arm_job(job, "old").lora.lora_r == 2
    assert build_arm_job(job, "new").lora.lora_r == 4
    wrong = arms.replace("}}}}", ", lora.lora_r: 8}}}}")
    with pytest.raises(
        JobFileError,
        match=r"compare|lora\.lora_r is 8, but the adapter of train\.init_adapter has 2",
    ):
        llama_job(wrong)


def test_an_adapter_with_resized_embeddings_gets_a_sentence(
    llama_job: JobMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    vocabulary = model.config.vocab_size
    model.resize_token_embeddings(vocabulary + 8)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "big", save_embedding_layers=True)
    words = rf"embeddings resized to {vocabulary + 8} tokens, but the base has {vocabulary}: resize the base"
    text = llama_job().text.replace("lora: {lora_r: 4}\n", "")
    loaded = load_text(text, tmp_path / "job.yaml", (f"train.init_adapter={tmp_path / 'big'}",))
    with pytest.raises(JobFileError, match=words):
        check_names(loaded)
    with pytest.raises(UserError, match=words):
        load_weights(loaded.job, load_base(loaded.job, 0, CPU), tmp_path / "big")


@pytest.mark.parametrize(
    "value",
    [
        *("{lora.lora_r: 0}", "{lora.lora_r: abc}", "{lora.lora_r: null}", "{lora.foo: 1}"),
        *(
            "{train.learning_rate: [1, 2]}",
            "{lora.lora_target_modules: []}",
            "{train.packing: true}",
        ),
        "{train.global_batch_size: 17}",
    ],
)
def test_a_wrong_value_of_an_arm_is_a_sentence(
    value: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    text = (
        bert_job().text
        + f"compare: {{arms: {{a: {{method: lora}}, b: {{method: lora, set: {value}}}}}}}\n"
    )
    (tmp_path / "job.yaml").write_text(text)
    for words in (("validate", "job.yaml"), ("plan", "job.yaml", "--compare")):
        done = lorafleet_here(*words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "compare.arms.b" in done.stderr


def test_arithmetic_of_an_arm_is_its_own(bert_job: JobMaker) -> None:
    arms = (
        "compare: {arms: {a: {method: lora}, b: {method: lora, set: {lora.lora_r: 16, alpha: "
        "3*r}}}}"
    )
    job = bert_job(arms).job
    assert build_arm_job(job, "b").lora.lora_alpha == 48
    assert build_arm_job(job, "a").lora.lora_alpha == 8


@pytest.mark.parametrize(
    "odd",
    [
        {"model_type": ["bert"]},
        {"model_type": None},
        {"max_position_embeddings": [64]},
        {"max_position_embeddings": "abc"},
        {"architectures": 3, "model_type": "unheard-of"},
        {"num_labels": "x"},
        {"pad_token_id": [0, 1]},
        {"text_config": [1]},
    ],
)
def test_an_odd_config_is_a_sentence_or_fine(
    odd: dict[str, Any], bert_job: JobMaker, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "roberta", pad_token_id=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | odd))
    loaded = bert_job(model__model_name_or_path=str(folder))
    (tmp_path / "job.yaml").write_text(
        loaded.text.replace(loaded.job.model.model_name_or_path, str(folder))
    )
    done = lorafleet_here(
        "validate", "job.yaml", f"model.model_name_or_path={folder}", cwd=tmp_path
    )
    assert done.returncode in (0, 2), done.stderr
    assert "bug in lorafleet" not in done.stderr
    with (
        pytest.raises((AssetError, UserError))
        if done.returncode
        else suppress(AssetError, UserError)
    ):
        load_base(loaded.job, 2, CPU)


def test_broken_weights_are_a_sentence(bert_job: JobMaker, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(AssetError, match="cannot be loaded for classification"):
        load_base(bert_job(model__model_name_or_path=str(folder)).job, 2, CPU)


def test_adapters_that_do_not_fit_the_task(
    bert_job: JobMaker, llama_job: JobMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    writes = _adapter(tmp_path / "lm", tiny_llama, r=4, target_modules=["q_proj"])
    names = _adapter(
        tmp_path / "cls",
        tiny_llama,
        "AutoModelForSequenceClassification",
        r=4,
        target_modules=["q_proj"],
    )
    text = bert_job().text.replace('lora: {lora_r: 4, lora_alpha: "2*lora_r"}\n', "")
    base = (f"model.model_name_or_path={tiny_llama}",)
    classifier = load_text(text, tmp_path / "job.yaml", (*base, f"train.init_adapter={writes}"))
    with pytest.raises(
        JobFileError,
        match=r"whose adapter generates text .CAUSAL_LM., but the job has another task",
    ):
        check_names(classifier)
    writer = llama_job(train__init_adapter=str(names), lora__lora_alpha=8)
    with pytest.raises(JobFileError, match=r"whose adapter predicts classes .SEQ_CLS."):
        check_names(writer)
    three = load_text(text, tmp_path / "job.yaml", (*base, f"train.init_adapter={names}")).job
    rows = [{"text": f"is it {number}", "label": f"c{number % 3}"} for number in range(30)]
    data = three.data.model_copy(
        update={"train_file": str(write_rows(tmp_path / "three.jsonl", rows))}
    )
    data = data.model_copy(update={"validation_file": None, "test_file": None})
    with pytest.raises(UserError, match="whose head has 2 classes, but the rows have 3"):
        session(three.model_copy(update={"data": data}))


def test_a_learnt_prompt_is_trained_on(bert_job: JobMaker, tmp_path: Path) -> None:
    prompt = {
        "method": "prompt_tuning",
        "prompt_tuning__num_virtual_tokens": 4,
        "train__learning_rate": 0.1,
    }
    first = session(bert_job(**prompt).job)
    finish(first)
    first.save_weights(tmp_path / "first")
    before = first.evaluate("train").metrics["loss"]
    on = session(bert_job(**prompt, train__init_adapter=str(tmp_path / "first")).job)
    assert on.evaluate("train").metrics["loss"] == pytest.approx(before, rel=1e-5)
    finish(on)
    assert on.evaluate("train").metrics["loss"] < before


def test_a_path_with_the_loaded_models_prefix_is_a_layer(bert_job: JobMaker) -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    check_names(bert_job(lora__lora_target_modules=[path]))
    with pytest.raises(JobFileError, match="has 'score', 'embed_out', but"):
        check_names(bert_job(lora__lora_target_modules=["query", "score", "embed_out"]))


def test_arms_do_not_change_the_adapter_of_the_job(
    llama_job: JobMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = _adapter(
        tmp_path / "r4", tiny_llama, r=4, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.1
    )
    arms = "compare: {arms: {a: {method: lora}, b: {method: lora, set: {lora.lora_r: 16}}}}"
    own = {"train__init_adapter": str(adapter)}
    with pytest.raises(
        JobFileError, match=r"lora\.lora_r is 16, but the adapter of train\.init_adapter has 4"
    ):
        llama_job(arms, **own)
    dropout = (
        "compare: {arms: {a: {method: lora}, b: {method: lora, set: {lora.lora_dropout: 0.3}}}}"
    )
    assert build_arm_job(llama_job(dropout, **own).job, "b").lora.lora_dropout == 0.3
    with pytest.raises(JobFileError, match="lora_target_modules is 5"):
        llama_job(lora__lora_target_modules=5, **own)


@pytest.mark.parametrize("said", [{"use_bidirectional_attention": True}, {"is_causal": False}])
def test_attention_in_both_directions_is_not_causal(said: dict[str, Any]) -> None:
    config = {"model_type": "gemma3_text"} | said
    assert not is_causal(config)
    assert "attention in both directions" in str(get_generation_refusal(config, "x"))
