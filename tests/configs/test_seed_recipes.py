"""The seed document's recipes, written as LLMC writes them, load unchanged."""

from textwrap import dedent, indent

import pytest

from configs.loading import ineffective_keys, load_recipe
from configs.schemes import export_problems, scheme_name

HEAD = """\
base:
    seed: &seed {seed}
model:
    type: Llama
    path: /models/llama
    tokenizer_mode: slow
    torch_dtype: auto
{calib}{evaluation}"""

EVALUATION = """\
eval:
    eval_pos: [fake_quant]
    name: wikitext2
    download: False
    path: /data/wikitext2
    seq_len: 2048
    bs: 1
    inference_per_block: False
"""


def calib(name: str, n_samples: int, seq_len: int, bs: int, preproc: str) -> str:
    return dedent(f"""\
        calib:
            name: {name}
            download: False
            path: /data/{name}
            n_samples: {n_samples}
            bs: {bs}
            seq_len: {seq_len}
            preproc: {preproc}
            seed: *seed
        """)


P = calib("pileval", 128, 512, -1, "txt_general_preproc")
P512 = calib("pileval", 512, 512, 1, "txt_general_preproc")
W = calib("wikitext2", 128, 2048, 1, "wikitext2_gptq")

INT_GROUP = """\
weight:
    bit: {bit}
    symmetric: True
    granularity: per_group
    group_size: 128
    need_pack: True
"""
W4, W8 = INT_GROUP.format(bit=4), INT_GROUP.format(bit=8)
W8A8 = """\
weight:
    bit: 8
    symmetric: True
    granularity: per_channel
    group_size: -1
    qmax_to_tensor: True
    calib_algo: minmax
act:
    bit: 8
    symmetric: True
    granularity: per_token
    qmax_to_tensor: True
    calib_algo: minmax
"""
FP8 = """\
quant_type: float_quant
weight:
    bit: e4m3
    symmetric: True
    granularity: per_channel
    use_qtorch: True
act:
    bit: e4m3
    symmetric: True
    granularity: per_token
    use_qtorch: True
"""
FP8_STATIC = """\
quant_type: float-quant
weight:
    bit: e4m3
    symmetric: True
    granularity: per_tensor
    use_qtorch: True
act:
    bit: e4m3
    symmetric: True
    granularity: per_tensor
    use_qtorch: True
    static: True
"""
AWQ = "special:\n    trans: True\n    trans_version: v2\n    weight_clip: True\nquant_out: True\n"
GPTQ = """\
special:
    actorder: True
    static_groups: {static_groups}
    percdamp: 0.01
    blocksize: 128
    true_sequential: True
    online_rotate: False
    fp32_had: True
quant_out: True
"""
ALPHA = "special:\n    alpha: 0.5\n"
AWQ_FIRST = """\
special:
    trans: True
    trans_version: v1
    weight_clip: False
    save_scale: False
    save_clip: False
"""
OMNIQUANT = """\
special:
    aug_loss: False
    lwc: True
    let: False
    lwc_lr: 0.01
    let_lr: 0.005
    use_shift: False
    alpha: 0.5
    deactive_amp: True
    epochs: 5
    wd: 0
    search_clip_init: True
quant_out: True
"""
QUAROT = "special:\n    rotate_mode: hadamard\n    fp32_had: True\n    online_rotate: False\n"

# name: method, scheme, seed, calibration, numbers, special keys
SEED = {
    "rtn_w8a16": ("RTN", "W8A16", 42, "", W8, ""),
    "rtn_w4a16": ("RTN", "W4A16", 42, "", W4, ""),
    "rtn_w8a8": ("RTN", "W8A8", 42, "", W8A8, ""),
    "awq_w4a16": ("Awq", "W4A16", 42, P, W4, AWQ),
    "awq_w8a8": ("Awq", "W8A8", 42, P, W8A8, AWQ),
    "gptq_w4a16": ("GPTQ", "W4A16", 0, W, W4, GPTQ.format(static_groups=True)),
    "smoothquant_w8a8": ("SmoothQuant", "W8A8", 42, P512, W8A8, ALPHA),
    "os_plus_w8a8": ("OsPlus", "W8A8", 42, P, W8A8, ALPHA),
    "fp8/rtn_fp8": ("RTN", "FP8 dynamic", 42, "", FP8, ""),
    "fp8/awq_fp8": ("Awq", "FP8 dynamic", 42, P, FP8, AWQ),
    "fp8/gptq_fp8": ("GPTQ", "FP8 dynamic", 42, W, FP8, GPTQ.format(static_groups=False)),
    "fp8/smoothquant_fp8": ("SmoothQuant", "FP8 dynamic", 42, P512, FP8, ALPHA),
    "fp8/awq_fp8_static": ("Awq", "FP8 static", 42, P, FP8_STATIC, AWQ),
    "w4a16_combin/step_1_awq": ("Awq", "W4A16", 42, P, W4, AWQ_FIRST),
    "w4a16_combin/step_2_omniq": ("OmniQuant", "W4A16", 42, W, W4, OMNIQUANT),
    "w8a8_combin/step_1_quarot": ("Quarot", "W8A8", 0, "", W8A8, QUAROT),
    "w8a8_combin/step_2_gptq": ("GPTQ", "W8A8", 0, W, W8A8, GPTQ.format(static_groups=True)),
}
SAVE = "save:\n    save_sgl: True\n    save_path: /save/for/sgl/\n"


# the first file of a combination writes what the second one reads
SAVE_TRANS = "save:\n    save_trans: True\n    save_fake: False\n    save_path: /save/for/step/2/\n"


def as_llmc_file(name: str) -> str:
    method, _, seed, text, numbers, special = SEED[name]
    head = HEAD.format(seed=seed, calib=text, evaluation=EVALUATION)
    quant = f"method: {method}\n{numbers}{special}"
    save = SAVE_TRANS if "/step_1" in name else SAVE
    return f"{head}quant:\n{indent(quant, '    ')}{save}"


@pytest.mark.parametrize("name", SEED)
def test_a_seed_recipe_loads_as_written_and_is_served(name, tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text(as_llmc_file(name))
    recipe = load_recipe(file)
    method, scheme, seed, text, _, _ = SEED[name]
    (step,) = recipe.resolved_steps()
    assert (step.quant.method, scheme_name(step.quant)) == (method, scheme)
    assert export_problems(recipe) == []
    assert recipe.base.seed == seed
    assert (step.calib is not None) == bool(text)
    assert step.calib is None or step.calib.seed == seed
    assert "model.tokenizer_mode" in ineffective_keys(recipe)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("w4a16_combin/step_1_awq", "w4a16_combin/step_2_omniq"),
        ("w8a8_combin/step_1_quarot", "w8a8_combin/step_2_gptq"),
    ],
)
def test_a_combination_is_one_recipe_of_two_steps(first, second, tmp_path):
    _, scheme, seed, _, _, _ = SEED[second]
    steps = ""
    for name in (first, second):
        method, _, _, text, numbers, special = SEED[name]
        quant = f"quant:\n{indent(f'method: {method}{chr(10)}{numbers}{special}', '    ')}"
        steps += "  - " + indent(quant + text, "    ").lstrip()
    file = tmp_path / "combination.yml"
    file.write_text(HEAD.format(seed=seed, calib="", evaluation=EVALUATION) + "steps:\n" + steps)
    recipe = load_recipe(file)
    methods = [step.quant.method for step in recipe.resolved_steps()]
    assert methods == [SEED[first][0], SEED[second][0]]
    assert scheme_name(recipe.resolved_steps()[-1].quant) == scheme
    assert export_problems(recipe) == []


# Every key that the seed document lists, with a value that changes nothing or is harmless.
ALL_KEYS = """\
base: {seed: 42}
model: {type: Llama, path: m, tokenizer_mode: slow, torch_dtype: torch.bfloat16}
calib: {name: pileval, download: false, path: d, n_samples: 8, bs: -1, seq_len: 512,
        preproc: txt_general_preproc, seed: 42}
eval: {eval_pos: [pretrain, fake_quant], name: wikitext2, type: ppl, download: false, path: d,
       seq_len: 2048, bs: 1, inference_per_block: true, eval_token_consist: true}
quant:
    method: METHOD
    quant_type: int_quant
    weight: {bit: 4, symmetric: true, granularity: per_group, group_size: 128, need_pack: true,
             quant_type: int-quant, use_qtorch: false, calib_algo: learnable, ste: true,
             qmax_to_tensor: true}
    special: {SPECIAL}
    quant_out: true
save: {save_sgl: true, save_trans: false, save_fake: false, save_path: out}
ignored_layers: [lm_head]
"""
SPECIAL_OF = {
    "Awq": "trans: true, trans_version: v1, weight_clip: true, clip_version: v2, clip_sym: true, "
    "awq_bs: 1, save_mem: true, save_scale: true, scale_path: a, save_clip: true, clip_path: b, "
    "do_gqa_trans: true",
    "GPTQ": "actorder: true, static_groups: true, percdamp: 0.01, blocksize: 128, "
    "true_sequential: true, chunk_num: 4, owq: false, online_rotate: false, fp32_had: true",
    "OmniQuant": "aug_loss: false, lwc: true, let: true, lwc_lr: 1e-2, let_lr: 0.005, "
    "use_shift: false, alpha: 0.5, deactive_amp: true, epochs: 5, wd: 0, search_clip_init: true, "
    "load_clip: false, clip_path: a, search_scale_init: false, scale_path: b",
    "Quarot": "rotate_mode: hadamard, fp32_had: true, online_rotate: false",
    "SmoothQuant": "alpha: 0.5",
    "OsPlus": "alpha: 0.5",
    "RTN": "",
    "Identity": "",
}


@pytest.mark.parametrize("method", SPECIAL_OF)
def test_every_key_of_the_seed_document_is_accepted(method, tmp_path):
    file = tmp_path / "all.yml"
    text = ALL_KEYS.replace("METHOD", method).replace("SPECIAL", SPECIAL_OF[method])
    file.write_text(text)
    recipe = load_recipe(file)
    assert recipe.quant is not None
    written = {pair.split(":")[0].strip() for pair in SPECIAL_OF[method].split(",") if pair}
    assert recipe.quant.special.model_fields_set == written


@pytest.mark.parametrize(
    ("spelling", "method"),
    [
        ("rtn", "RTN"),
        ("AWQ", "Awq"),
        ("gptq", "GPTQ"),
        ("smooth_quant", "SmoothQuant"),
        ("Smooth-Quant", "SmoothQuant"),
        ("OS+", "OsPlus"),
        ("os_plus", "OsPlus"),
        ("QuaRot", "Quarot"),
        ("omniquant", "OmniQuant"),
        ("identity", "Identity"),
    ],
)
def test_methods_are_known_by_any_usual_spelling(spelling, method, tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text(
        f"calib: {{name: pileval}}\nquant: {{method: {spelling}, "
        "weight: {bit: 8, granularity: per_channel}}"
    )
    recipe = load_recipe(file)
    assert recipe.quant is not None
    assert recipe.quant.method == method


@pytest.mark.parametrize("place", ["quant.quant_type", "quant.weight.quant_type"])
@pytest.mark.parametrize("spelling", ["float_quant", "float-quant"])
def test_the_three_places_and_spellings_of_quant_type(place, spelling):
    recipe = load_recipe("fp8/rtn_fp8", ["quant.quant_type=null", f"{place}={spelling}"])
    assert scheme_name(recipe.resolved_steps()[0].quant) == "FP8 dynamic"
    assert recipe.canonical() == load_recipe("fp8/rtn_fp8").canonical()
