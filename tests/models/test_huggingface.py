"""Checkpoints go out and come back bit for bit, and nothing that does not fit comes in. Parity: tests/parity."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from tapojax.models import config_json, decoder, huggingface
from tapojax.models.config import DecoderConfig, Llama3Rope

QWEN2 = DecoderConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=1e6,
    qkv_bias=True,
)
CONFIGS = {
    "qwen2": QWEN2,
    "qwen2 tied": dataclasses.replace(QWEN2, tie_embeddings=True),
    "qwen3": dataclasses.replace(QWEN2, qkv_bias=False, qk_norm=True, head_dim=10),
    "qwen3 biased": dataclasses.replace(QWEN2, qk_norm=True, output_bias=True),
    "llama": dataclasses.replace(
        QWEN2, qkv_bias=False, norm_eps=1e-5, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, original_max_position=64)
    ),
    "llama biased": dataclasses.replace(QWEN2, output_bias=True, mlp_bias=True, head_dim=8),
}
TIED = CONFIGS["qwen2 tied"]


def random_params(config, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(jnp.dtype(dtype)), shapes)


def assert_same_bits(got, want):
    got, want = (traverse_util.flatten_dict(tree, sep="/") for tree in (got, want))
    assert sorted(got) == sorted(want)
    for path, x in want.items():
        assert got[path].dtype == x.dtype, path
        assert got[path].tobytes() == x.tobytes(), f"{path} changed its bits"


@pytest.fixture
def saved(tmp_path):
    """A folder of CONFIGS["qwen2 tied"] that tests may damage, and its tensors."""
    huggingface.save_params(tmp_path / "model", random_params(TIED), TIED)
    return tmp_path / "model", load_file(tmp_path / "model" / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


# ---- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load_is_bit_exact(name, dtype, max_shard_bytes, tmp_path):
    config, params = CONFIGS[name], random_params(CONFIGS[name], dtype)
    huggingface.save_params(tmp_path / "x", params, config, max_shard_bytes=max_shard_bytes)
    assert ((tmp_path / "x" / "model.safetensors.index.json").exists()) == (max_shard_bytes == 4000)
    read = config_json.read_config(tmp_path / "x")
    assert read == dataclasses.replace(config, dtype=dtype), "config.json round trip"
    assert_same_bits(huggingface.load_params(tmp_path / "x", read, dtype=dtype), params)


def test_the_table_says_where_every_element_goes(tmp_path):
    """By plain loops, not by the table: torch computes W x with W [out, in], rows grouped by head."""
    config = CONFIGS["llama biased"]
    params = random_params(config)
    huggingface.save_params(tmp_path / "x", params, config)
    theirs, layer = load_file(tmp_path / "x" / "model.safetensors"), params["layers"]
    heads, dim = config.num_heads, config.head_dim
    for i in range(config.num_layers):
        attention = f"model.layers.{i}.self_attn."
        for n in range(heads):
            for h in range(dim):
                row = theirs[attention + "q_proj.weight"][n * dim + h]
                np.testing.assert_array_equal(row, layer["query"]["kernel"][i, :, n, h])
                assert theirs[attention + "q_proj.bias"][n * dim + h] == layer["query"]["bias"][i, n, h]
                column = theirs[attention + "o_proj.weight"][:, n * dim + h]
                np.testing.assert_array_equal(column, layer["output"]["kernel"][i, n, h])
        np.testing.assert_array_equal(theirs[f"model.layers.{i}.mlp.up_proj.weight"].T, layer["up"]["kernel"][i])
        np.testing.assert_array_equal(theirs[f"model.layers.{i}.mlp.down_proj.weight"].T, layer["down"]["kernel"][i])
    np.testing.assert_array_equal(theirs["lm_head.weight"], params["head"])
    np.testing.assert_array_equal(theirs["model.embed_tokens.weight"], params["embedding"])


def test_device_arrays_are_saved_like_host_arrays(tmp_path):
    params = random_params(TIED, "bfloat16")
    huggingface.save_params(tmp_path / "x", jax.tree.map(jnp.asarray, params), TIED)
    assert_same_bits(huggingface.load_params(tmp_path / "x", TIED, dtype="bfloat16"), params)


def test_dtype_is_cast_on_the_way_out_and_in(tmp_path):
    params = random_params(TIED)
    huggingface.save_params(tmp_path / "x", params, TIED, dtype="bfloat16")
    assert config_json.read_config(tmp_path / "x").dtype == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_same_bits(huggingface.load_params(tmp_path / "x", TIED, dtype="bfloat16"), rounded)
    as_float32 = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    assert_same_bits(huggingface.load_params(tmp_path / "x", TIED), as_float32)


def test_shards_respect_the_limit_and_the_index_names_every_tensor_once(tmp_path):
    huggingface.save_params(tmp_path / "x", random_params(TIED), TIED, max_shard_bytes=6000)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(huggingface.manifest(TIED))
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / "x" / file)
        size = sum(x.nbytes for x in tensors.values())
        assert size <= 6000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file}
        total += size
    assert index["metadata"]["total_size"] == total
    assert not list((tmp_path / "x").glob("shard-*"))


def test_manifest_shapes_are_those_of_the_file(saved):
    folder, tensors = saved
    assert {n: t.shape for n, t in huggingface.manifest(TIED).items()} == {n: x.shape for n, x in tensors.items()}


# ---- config.json


def folder_with(folder, **changes):
    folder.mkdir(exist_ok=True)
    raw = config_json.to_json(QWEN2, dtype="float32") | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


def test_both_rope_layouts_are_read(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    scaling["original_max_position_embeddings"] = 64
    llama = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    old = folder_with(tmp_path / "4", **llama, rope_theta=5e5, rope_scaling=scaling, rope_parameters=..., dtype=...)
    new = {"rope_theta": ..., "rope_scaling": ..., "torch_dtype": ..., "rope_parameters": scaling | {"rope_theta": 5e5}}
    new = folder_with(tmp_path / "5", **llama, **new)
    read = config_json.read_config(old)
    assert read == config_json.read_config(new)
    assert (read.rope_theta, read.rope_scaling) == (5e5, Llama3Rope(8.0, 1.0, 4.0, 64))


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_default_rope_is_no_scaling(scaling, tmp_path):
    read = config_json.read_config(folder_with(tmp_path, rope_scaling=scaling, rope_parameters=..., rope_theta=777.0))
    assert (read.rope_scaling, read.rope_theta) == (None, 777.0)


def test_absent_and_null_keys_take_the_defaults_of_transformers(tmp_path):
    absent = dict.fromkeys(("num_key_value_heads", "head_dim", "tie_word_embeddings", "rms_norm_eps"), ...)
    absent |= dict.fromkeys(("rope_theta", "rope_parameters", "rope_scaling", "dtype", "torch_dtype"), ...)
    want = DecoderConfig(50, 24, 40, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=6, qkv_bias=True)
    assert config_json.read_config(folder_with(tmp_path / "absent", **absent)) == want
    assert config_json.read_config(folder_with(tmp_path / "null", **dict.fromkeys(absent, None))) == want


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*bits"),
        ({"dtype": ..., "torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "not supported.*full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor, original"),
        ({"hidden_size": ..., "vocab_size": None}, "2 missing: hidden_size, vocab_size"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        config_json.read_config(folder_with(tmp_path, **changes))


def test_a_config_that_is_not_there_or_not_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Qwen/Qwen2.5-0.5B is not a folder.*hf download Qwen/Qwen2.5-0.5B"):
        config_json.read_config("Qwen/Qwen2.5-0.5B")
    with pytest.raises(ValueError, match="config.json is missing"):
        config_json.read_config(tmp_path)
    for text in ("{", "[1]", "version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json (is not JSON|holds a list).*again"):
            config_json.read_config(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"mlp_bias": True}, {"qkv_bias": False, "output_bias": True}, {"qk_norm": True}, {"head_dim": 8}]
)
def test_a_shape_of_no_family_is_not_written(changes, tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face family"):
        config_json.write_config(dataclasses.replace(QWEN2, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_token_ids_and_length_are_written(tmp_path):
    keys = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "max_position_embeddings": 99}
    config_json.write_config(QWEN2, tmp_path, **keys)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert {key: raw[key] for key in keys} == keys
    config_json.write_config(QWEN2, tmp_path, eos_token_id=None)
    assert "eos_token_id" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(TypeError, match="eos_token"):
        config_json.write_config(QWEN2, tmp_path, eos_token=3)


# ---- what goes along from the source


def test_source_gives_its_config_and_tokenizer(tmp_path):
    source = folder_with(tmp_path / "source", publisher_note="kept", dtype="bfloat16", bos_token_id=7)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(name)
    (source / "model.safetensors").write_text("must not be copied")
    huggingface.save_params(tmp_path / "x", random_params(QWEN2), QWEN2, source=source, eos_token_id=3)
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (raw["publisher_note"], raw["bos_token_id"], raw["eos_token_id"]) == ("kept", 7, 3)
    assert raw["dtype"] == raw["torch_dtype"] == "float32", "config.json must say what is stored"
    assert (tmp_path / "x" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "x" / "generation_config.json").exists()
    huggingface.load_params(tmp_path / "x", QWEN2)


def test_source_may_hold_a_tokenizer_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    huggingface.save_params(tmp_path / "x", random_params(QWEN2), QWEN2, source=tmp_path)
    assert (tmp_path / "x" / "tokenizer.json").exists()
    assert config_json.read_config(tmp_path / "x") == QWEN2


def test_source_of_another_model_or_with_nothing_is_refused(tmp_path):
    source = folder_with(tmp_path / "source", vocab_size=51)
    with pytest.raises(ValueError, match=r"vocab_size=50 \(source: 51\)"):
        huggingface.save_params(tmp_path / "x", random_params(QWEN2), QWEN2, source=source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither tokenizer files nor a config"):
        huggingface.save_params(tmp_path / "x", random_params(QWEN2), QWEN2, source=tmp_path / "empty")
    with pytest.raises(ValueError, match="absent is not a folder"):
        huggingface.save_params(tmp_path / "x", random_params(QWEN2), QWEN2, source=tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]


# ---- tensors that do not fit


def test_missing_unexpected_and_misshapen_tensors_are_all_named(saved):
    folder, tensors = saved
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(24, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros(1, np.float32)
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(23, np.float32)
    rewrite(folder, tensors)
    with pytest.raises(ValueError) as error:
        huggingface.load_params(folder, TIED)
    for words in (
        "2 missing: model.layers.0.mlp.up_proj.weight, model.norm.weight;",
        "2 unexpected: model.layers.0.self_attn.o_proj.bias, model.layers.2.mlp.up_proj.weight;",
        "1 of another shape: model.layers.1.self_attn.q_proj.bias (23,) (config: (24,)).",
        str(folder),
    ):
        assert words in str(error.value)


def test_long_lists_end_in_a_count(saved):
    folder, tensors = saved
    rewrite(folder, {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"25 missing: .*, \.\.\. and 5 more"):
        huggingface.load_params(folder, TIED)


def test_another_vocabulary_size_is_a_shape(saved):
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight \(50, 24\) \(config: \(49, 24\)\)"):
        huggingface.load_params(saved[0], dataclasses.replace(TIED, vocab_size=49))


def test_an_untied_config_misses_the_head_of_a_tied_checkpoint(saved):
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        huggingface.load_params(saved[0], QWEN2)


def test_integer_tensors_are_not_weights(saved):
    folder, tensors = saved
    rewrite(folder, tensors | {"model.norm.weight": np.zeros(24, np.int8)})
    with pytest.raises(ValueError, match="1 not float: model.norm.weight I8"):
        huggingface.load_params(folder, TIED)


def test_rotary_buffers_are_passed_over(saved):
    folder, tensors = saved
    rewrite(folder, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)})
    assert_same_bits(huggingface.load_params(folder, TIED), random_params(TIED))


def test_a_second_head_beside_tied_embeddings_must_equal_them(saved):
    folder, tensors = saved
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(folder, tensors | {"lm_head.weight": embedding.copy()})
    assert_same_bits(huggingface.load_params(folder, TIED), random_params(TIED))
    other = embedding.copy()
    other[-1, -1] += 1
    rewrite(folder, tensors | {"lm_head.weight": other})
    with pytest.raises(ValueError, match="tie_word_embeddings is true, yet lm_head.weight differs"):
        huggingface.load_params(folder, TIED)


def test_params_of_another_config_are_not_saved(tmp_path):
    params = random_params(TIED)
    params["layers"]["query"]["kernel_lora_a"] = np.zeros((2, 24, 4), np.float32)
    params["final_norm"] = {"scale": np.zeros(23, np.float32)}
    with pytest.raises(ValueError) as error:
        huggingface.save_params(tmp_path / "x", params, QWEN2)
    for words in (
        "1 missing: head;",
        "1 unexpected: layers/query/kernel_lora_a;",
        "final_norm/scale (23,) (config: (24,))",
    ):
        assert words in str(error.value)
    assert not list(tmp_path.iterdir()), "a refused export left something behind"


# ---- files that are not whole


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(kept, saved):
    file = saved[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors \(\d+ bytes\) is not a whole safetensors file.*Download"):
        huggingface.load_params(saved[0], TIED)


def test_a_folder_without_safetensors_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        huggingface.load_params(tmp_path / "absent", TIED)
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither .* but config.json, pytorch_model.bin"):
        huggingface.load_params(saved[0], TIED)


@pytest.fixture
def sharded(tmp_path):
    huggingface.save_params(tmp_path / "model", random_params(TIED), TIED, max_shard_bytes=6000)
    return tmp_path / "model", tmp_path / "model" / "model.safetensors.index.json"


def test_missing_and_truncated_shards_are_named(sharded):
    folder, index = sharded
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    (folder / files[0]).write_bytes((folder / files[0]).read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{files[0]} .* not a whole safetensors file"):
        huggingface.load_params(folder, TIED)
    for file in files[:2]:
        (folder / file).unlink()
    with pytest.raises(ValueError, match=f"2 absent: {files[0]}, {files[1]}. Download"):
        huggingface.load_params(folder, TIED)


def test_an_index_of_other_shards_is_refused(sharded):
    folder, index = sharded
    raw = json.loads(index.read_text())
    moved = max(raw["weight_map"], key=raw["weight_map"].get)
    raw["weight_map"][moved] = raw["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"do not belong together.*{moved} in model-00001"):
        huggingface.load_params(folder, TIED)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match="index.json.*weight_map"):
        huggingface.load_params(folder, TIED)


def test_one_file_and_an_index_side_by_side_are_refused(saved):
    (saved[0] / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds both .* delete the stale one"):
        huggingface.load_params(saved[0], TIED)


# ---- writing whole or not at all


def test_an_export_never_replaces_another(saved):
    before = (saved[0] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty"):
        huggingface.save_params(saved[0], random_params(TIED, seed=1), TIED)
    assert (saved[0] / "model.safetensors").read_bytes() == before


def test_an_empty_folder_may_be_filled(tmp_path):
    huggingface.save_params(tmp_path, random_params(TIED), TIED)
    assert_same_bits(huggingface.load_params(tmp_path, TIED), random_params(TIED))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A real refusal of the operating system: no file may grow past 8 kB here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="cannot write .*model.*Nothing was left behind"):
            huggingface.save_params(tmp_path / "model", random_params(TIED), TIED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_between_shards_leaves_nothing_behind(tmp_path, monkeypatch):
    written = []

    def save_two_then_fail(tensors, file, metadata):
        if len(written) == 2:
            raise safetensors.SafetensorError("No space left on device (os error 28)")
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", save_two_then_fail)
    with pytest.raises(OSError, match="No space left on device"):
        huggingface.save_params(tmp_path / "deep" / "model", random_params(TIED), TIED, max_shard_bytes=6000)
    assert len(written) == 2
    assert not list((tmp_path / "deep").iterdir())
