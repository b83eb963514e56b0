"""What a configuration says wrong is one sentence, before anything is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cascade.networks.stage_a import StageA
from tests.training.small import train, write_config, write_pictures
from training.agreement import check_agreement
from training.configuration import check_tables, read_configuration
from training.errors import TrainingError
from training.options import Options

ROOT = Path(__file__).parent.parent.parent
MINI = ROOT / "miniature" / "mini.toml"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # Names and kinds.
        ("stage_aa.options = {}", "The configuration has an unknown table [stage_aa]; there are model, data,"),
        ("vqgan.embed_dims = 16", "[vqgan] has an unknown name embed_dims; it may hold in_channels,"),
        ("text_encoder.wide = 32", "[text_encoder] has an unknown name wide; it may hold"),
        ("stage_b.options.batch = 3", "[stage_b] options has an unknown name batch; it may hold steps, batch_size,"),
        ("- stage_b.options.steps", "[stage_b] options lacks steps."),
        (
            "stage_a.task.latent_nois = 0.1",
            "[stage_a] task has an unknown name latent_nois; it may hold crop, latent_noise.",
        ),
        ("- stage_c.task.keep_image", "[stage_c] task lacks keep_image."),
        ("stage_c.options.steps = 8.5", "[stage_c] options steps is 8.5; it must be a whole number."),
        ('vqgan.embed_dim = "16"', "[vqgan] embed_dim is '16'; it must be a whole number."),
        ('vision.task.naming = "no"', "[vision] task naming is 'no'; it must be a number."),
        ("distil_c.task.own = 2.0", "[distil_c] task own is 2.0; it must be from 0 to 1."),
        ("distil_b.task.rank = 0", "[distil_b] task rank is 0; it must be from 1 to 512."),
        ("distil_b.task.settings = {}", "[distil_b] task has an unknown name settings; it may hold rank, paths,"),
        ("controlnet_inpainting.control.inverted = 25", "control inverted is 25; it must be from 0 to 1."),
        ('stage_b.task.weight.kind = "adapt"', "weight.kind is 'adapt'; it must be one of p2, adaptive."),
        ("stage_b.task.weight.kind = [0]", "weight.kind is [0]; it must be one of p2, adaptive."),
        ("stage_b.task.weight.buckets = 0", "[stage_b] task: weight buckets is 0; it must be at least 1."),
        ("stage_b.task.weight.momentum = 2", "[stage_b] task: weight momentum is 2; it must be from 0 to 1."),
        ("model.prior.steps = 0", "[model] prior: steps is 0; it must be a whole number, at least 1."),
        ("model.decoder.shift = -1", "[model] decoder: shift is -1; it must be a number above 0."),
        ("model.decoder.rescale = 2", "[model] decoder: rescale is 2; it must be a number from 0 to 1."),
        ("semantic.task.weight.kk = 1.0", "[semantic] task: weight has an unknown name kk; it may hold k, floor."),
        (
            "data.seeds = 0",
            "[data] has an unknown name seeds; it may hold size, other_sizes, other_sizes_every, source.",
        ),
        ("stage_b.options.seed = -1", "[stage_b] options: seed is -1; it must be from 0 to 4294967295."),
        ('stage_b.options.compile = "yes"', "compile is 'yes'; it must be true or false or 'auto'."),
        (
            "stage_b.options.decay = 9",
            "warmup (0) and decay (9) take 9 steps, more than steps, 8: the learning rate would",
        ),
        ("stage_b.options.ema = 1.0", "[stage_b] options: ema is 1.0; it must be at least 0 and below 1."),
        ("tokenizer.vocabulary = 300", "[tokenizer] vocabulary is 300; it must be at least 514"),
        # Sizes of pictures.
        ("data.size = 100", "[data] size is 100; it must be a multiple of 8 from 64 to 2048."),
        ("data.other_sizes = [[192, 124]]", "[data] other_sizes holds 124; it must be a multiple of 8"),
        (
            "data.other_sizes = [192]",
            "other_sizes is [192]; it must be a list, each a list of 2 values, each a whole number.",
        ),
        (
            "stage_a.task.crop = 512",
            "[stage_a] task crop is 512; it must be a multiple of 4, at most [data] size, 128.",
        ),
        # Networks.
        (
            "decoder.block_out_channels = [16, 16, 16]",
            "No decoder can be built from [decoder]: num_attention_heads has 2 values;",
        ),
        (
            "prior.num_attention_heads = [2, 5]",
            "No prior can be built from [prior]: num_attention_heads, 5, does not divide block_out_channels, 16.",
        ),
        (
            "decoder.num_attention_heads = [0, 0]",
            "No decoder can be built from [decoder]: num_attention_heads, 0, does not divide",
        ),
        ("decoder.patch_size = 0", "No decoder can be built from [decoder]: patch_size is 0; it must be at least 1."),
        ("decoder.patch_size = -1", "No decoder can be built from [decoder]: patch_size is -1; it must be at least 1."),
        ("prior.kernel_size = 4", "No prior can be built from [prior]: kernel_size is 4; it must be odd."),
        (
            "text_encoder.num_attention_heads = 3",
            "[text_encoder]: num_attention_heads, 3, does not divide hidden_size, 16.",
        ),
        (
            'prior.block_types_per_layer = [["SDAttn"], []]',
            "No prior can be built from [prior]: block_types_per_layer holds 'SDAttn'",
        ),
        ("effnet.strides = [1, 2, 2, 2, 1, 1]", "[effnet]: strides shrink pictures 16 times"),
        (
            "vqgan.levels = 3",
            "[vqgan]: up_down_scale_factor and levels shrink pictures 8 times; they must shrink them 4 times.",
        ),
        (
            "vqgan.embed_dim = 384\nvqgan.scale_factor = 0.3764",
            "[vqgan] scale_factor is 0.3764; with embed_dim 384 it must be another number, because these two are taken for the "
            "published Stage A, which is decoded with 0.43.",
        ),
        # What must agree.
        (
            "text_encoder.projection_dim = 24",
            "[text_encoder] projection_dim is 24, and [decoder] clip_text_pooled_in_channels is 16; they must be equal.",
        ),
        (
            "text_encoder.hidden_size = 48",
            "hidden_size is 48, and [prior] clip_text_in_channels is 16; they must be equal.",
        ),
        ("image_encoder.projection_dim = 20", "projection_dim is 20, and [prior] clip_image_in_channels is 16"),
        ("decoder.effnet_in_channels = 8", "[effnet] latent_channels is 16, and [decoder] effnet_in_channels is 8"),
        (
            "previewer_network.latent_channels = 8",
            "latent_channels is 16, and [previewer_network] latent_channels is 8",
        ),
        ("decoder.in_channels = 8", "[vqgan] latent_channels is 4, and [decoder] in_channels is 8"),
        ("controlnet.proj_blocks = [0, 4]", "[controlnet] proj_blocks holds 4; [prior] has 4 ResBlocks, from 0 to 3."),
        (
            "ip_adapter_network.blocks = [0, 4]",
            "[ip_adapter_network] blocks holds 4; [prior] has 4 attention blocks, from 0 to 3.",
        ),
        (
            "ip_adapter_network.blocks = [-1, 3]",
            "[ip_adapter_network] blocks holds -1; [prior] has 4 attention blocks, from 0 to 3.",
        ),
        (
            "ip_adapter_network.block_channels = 24",
            "[ip_adapter_network] block_channels is 24 for block 0, and [prior] is 16 wide there; they must be equal.",
        ),
        (
            "ip_adapter_network.block_channels = [16, 24]",
            "[ip_adapter_network] block_channels is 24 for block 3, and [prior] is 16 wide there; they must be equal.",
        ),
        (
            "controlnet.proj_blocks = [0, 0]",
            "[controlnet] proj_blocks is [0, 0]; each ResBlock may occur only once.",
        ),
        (
            "controlnet.proj_blocks = [-1, 3]",
            "[controlnet] proj_blocks holds -1; [prior] has 4 ResBlocks, from 0 to 3.",
        ),
    ],
)
def test_it_is_said_at_the_first_stage(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], change: str, sentence: str
) -> None:
    assert train(write_config(tmp_path, change), "tokenizer", pictures, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(b"[model", "config.toml is not a TOML file: "), (b"# caf\xe9", "is not a TOML file: 'utf-8'")],
)
def test_a_file_that_is_no_toml(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], text: bytes, sentence: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(text)
    assert train(config, "stage_a", pictures, tmp_path / "run") == 1
    assert sentence in capsys.readouterr().err
    config.unlink()
    assert train(config, "stage_a", pictures, tmp_path / "run") == 1
    assert capsys.readouterr().err == f"There is no configuration file {config}.\n"


@pytest.mark.slow
def test_right_configurations_pass(tmp_path: Path) -> None:
    for config in (read_configuration(MINI), read_configuration(write_config(tmp_path))):
        for stage in ("tokenizer", "stage_a", "stage_c", "controlnet_canny"):
            check_agreement(config, tmp_path / "model", stage)


def test_one_stage_needs_no_tables_of_others(tmp_path: Path) -> None:
    """With a model folder, the stage's own table is enough."""
    config = {name: table for name, table in read_configuration(MINI).items() if name in ("data", "stage_c")}
    check_tables(config)
    check_agreement(config, ROOT / "weights" / "mini", "stage_c")


@pytest.mark.parametrize(
    ("table", "stage"), [("prior", "stage_c"), ("stage_c", "stage_c"), ("controlnet", "controlnet_canny")]
)
def test_a_table_that_a_stage_needs_is_named(tmp_path: Path, table: str, stage: str) -> None:
    config = read_configuration(write_config(tmp_path, f"- {table}"))
    with pytest.raises(ValueError, match=rf"^The configuration has no table \[{table}\]"):
        check_agreement(config, tmp_path / "model", stage)


def test_what_the_model_folder_has_counts(tmp_path: Path) -> None:
    """The miniature's Stage C has eight ResBlocks, whatever the configuration says of another one."""
    config = read_configuration(MINI)
    mini = ROOT / "weights" / "mini"
    config["prior"]["down_num_layers_per_block"] = [1, 9]
    check_agreement(config, mini, "controlnet_canny")
    config["controlnet"]["proj_blocks"] = [0, 8]
    model = tmp_path / "model"
    shutil.copytree(mini, model, ignore=shutil.ignore_patterns("*.safetensors", "controlnet_canny"))
    with pytest.raises(ValueError, match=r"proj_blocks holds 8; .*model/prior has 8 ResBlocks, from 0 to 7\.$"):
        check_agreement(config, model, "controlnet_canny")
    settings = json.loads((model / "prior" / "config.json").read_text())
    (model / "prior" / "config.json").write_text(json.dumps(settings | {"clip_text_in_channels": 128}))
    with pytest.raises(
        ValueError, match=r"model/text_encoder hidden_size is 160, and .*model/prior clip_text_in_channels is 128;"
    ):
        check_agreement(config, model, "stage_c")


def test_the_published_stage_a_may_be_trained_further(tmp_path: Path) -> None:
    """Its width and scale are refused in the configuration only. A scale that is left out is not the class's default."""
    config, model = read_configuration(write_config(tmp_path)), tmp_path / "model"
    del config["vqgan"]["scale_factor"]
    config["vqgan"]["embed_dim"] = 384
    check_agreement(config, model, "stage_a")
    config["vqgan"]["scale_factor"] = 0.3764
    with pytest.raises(TrainingError, match="taken for the published Stage A"):
        check_agreement(config, model, "stage_a")
    StageA(embed_dim=384, bottleneck_blocks=1).save_config(model / "vqgan")
    check_agreement(config, model, "stage_a")


def test_fewer_steps_keep_the_schedules_shape() -> None:
    options = Options(**read_configuration(MINI)["stage_c"]["options"])
    for steps in (1, 7, 100, 5000, options.steps, 2 * options.steps):
        scaled = options.scaled(steps)
        assert scaled.steps == steps
        assert scaled.decay == options.decay * steps // options.steps
        assert scaled.warmup == options.warmup * steps // options.steps


def test_a_short_training_warms_up_in_a_tenth_of_it() -> None:
    common = {"batch_size": 1, "learning_rate": 1.0}
    assert Options(steps=100, **common).warmup == 10
    assert Options(steps=5000, **common).warmup == 200
    assert Options(steps=10, decay=10, **common).warmup == 0


def test_processes_divide_a_batch_if_the_stage_is_for_several_gpus() -> None:
    one, several = (Options(steps=1, batch_size=6, learning_rate=1.0, gpus=gpus) for gpus in (1, 3))
    assert [one.batch_of_one(processes) for processes in (1, 2)] == [6, 6]
    assert [several.batch_of_one(processes) for processes in (1, 2, 3)] == [6, 3, 2]
    assert [replace(one, accumulate=2).samples(processes) for processes in (1, 2)] == [12, 24]
    assert [replace(several, accumulate=2).samples(processes) for processes in (1, 2, 3)] == [12, 12, 12]
    with pytest.raises(TrainingError, match=r"^batch_size is 6; 4 processes cannot divide it equally\.$"):
        several.batch_of_one(4)
