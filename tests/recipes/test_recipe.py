"""Recipes say what the catalogue says, earlier files are read as they are, and what cannot work is refused by name."""

import importlib
import json

import pytest

from iabn_hub.checkpoints.catalogue import records_at_import
from iabn_hub.recipes import RECIPES as FOLDER
from iabn_hub.recipes import RecipeError, read_recipe

RECIPES = sorted(FOLDER.glob("*.json"))
PUBLISHED = [r for r in records_at_import().values() if r.training and r.dataset.startswith("imagenet")]


def test_every_published_classifier_and_every_resnet_has_a_recipe():
    assert len(PUBLISHED) == 9
    published = {record.name for record in PUBLISHED}
    resnets = {f"resnet{depth}_iabn.modern" for depth in (18, 34, 50, 101, 152)}
    digits = {"test_resnet_iabn.mnist", "resnet18_iabn.mnist"}
    scenes = {f"wider_resnet38_deeplab3_iabn.{data}" for data in ("vistas", "cityscapes")}
    scenes.add("test_resnet_deeplab3_iabn.shapes")
    assert {path.stem for path in RECIPES} == published | resnets | digits | scenes | {"finetune"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_for_its_network(path):
    named = path.stem.partition(".")[0]
    assert read_recipe(path).model == ("efficientnet_lite0_iabn" if named == "finetune" else named)


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda record: record.name)
def test_a_recipe_says_what_the_catalogue_says(record):
    recipe = read_recipe(FOLDER / f"{record.name}.json")
    training = record.training
    optimizer, schedule, images = recipe.optimizer, recipe.optimizer.schedule, recipe.input
    assert record.model.startswith(recipe.network.arch)
    assert {
        "norm_layer": recipe.norm_layer,
        "batch_size": optimizer.batch_size,
        "optimizer": optimizer.type,
        "momentum": optimizer.momentum,
        "nesterov": optimizer.nesterov,
        "weight_decay": optimizer.weight_decay,
        "learning_rate": optimizer.learning_rate,
        "schedule": {"type": schedule.type, "mode": schedule.mode, **schedule.params},
        "epochs": schedule.epochs,
        "clip": optimizer.clip,
        "weight_init": recipe.network.weight_init,
        "color_jitter": images.color_jitter_train,
        "lighting": images.lighting_train,
        "crop": images.crop_train,
        "input_3x3": recipe.network.input_3x3,
        "activation": recipe.network.activation,
        "activation_param": recipe.network.activation_param,
    } == training


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe with this content, and read it with these changes."""

    def read(content, *changes):
        path = tmp_path / "recipe.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_recipe(path, changes)

    return read


def test_defaults_are_those_of_the_earlier_package(recipe):
    read = recipe(
        {"network": {"arch": "resnet34"}, "optimizer": {"schedule": {"type": "step", "params": {"step_size": 30}}}}
    )
    assert (read.network.activation, read.network.bn_mode, read.norm_layer) == ("relu", "standard", "abn")
    assert (read.optimizer.clip, read.optimizer.batch_size, read.optimizer.nesterov) == (1.0, 256, False)
    assert (read.optimizer.schedule.epochs, read.optimizer.schedule.params) == (10, {"step_size": 30})
    assert (read.input.scale_val, read.input.mean) == (256, (0.485, 0.456, 0.406))


def test_what_is_saved_reads_back_the_same(recipe):
    first = recipe(
        {"network": {"activation": "elu", "bn_mode": "sync"}, "training": {"amp": "bf16", "ema_decay": 0.9999}}
    )
    assert recipe(first.to_json()) == first


def test_changes_on_the_command_line(recipe):
    changes = (
        "optimizer.learning_rate=0.05",
        "network.arch=resnet50",
        "optimizer.schedule.epochs=3",
        "training.amp=bf16",
    )
    read = recipe({"optimizer": {"learning_rate": 0.1}}, *changes)
    assert (read.optimizer.learning_rate, read.network.arch) == (0.05, "resnet50")
    assert (read.optimizer.schedule.epochs, read.training.amp) == (3, "bf16")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"netwrok": {}}, "unknown key 'netwrok'; did you mean 'network'"),
        ({"optimizer": {"lr": 1}}, "unknown key 'lr' in optimizer; there are batch_size, "),
        ({"optimizer": {"batch_size": "many"}}, "optimizer.batch_size is 'many': must be a valid integer"),
        ({"optimizer": {"batch_size": 2.5}}, "optimizer.batch_size is 2.5: must be a valid integer"),
        ({"optimizer": {"nesterov": 1}}, "optimizer.nesterov is 1: must be a valid boolean"),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate is True: must be a valid number"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate is -1: must be greater than or equal to"),
        ({"optimizer": {"schedule": {"type": "steps"}}}, "optimizer.schedule.type is 'steps': must be 'constant',"),
        ({"optimizer": {"schedule": {"type": "step"}}}, r"optimizer.schedule.params \(step\): missing field step_size"),
        (
            {"optimizer": {"schedule": {"type": "step", "params": {"step": 3}}}},
            r"optimizer.schedule.params \(step\): unknown key 'step'; did you mean 'step_size'",
        ),
        (
            {"optimizer": {"schedule": {"type": "step", "params": {"step_size": 0}}}},
            r"optimizer.schedule.params \(step\): step_size is 0: must be 1 or more",
        ),
        (
            {"optimizer": {"schedule": {"type": "multistep", "params": {"milestones": ["a"]}}}},
            r"optimizer.schedule.params \(multistep\): milestones.0 is 'a': must be a valid integer",
        ),
        (
            {"optimizer": {"schedule": {"type": "cosine", "params": {"gamma": 1}}}},
            "optimizer.schedule.params: a schedule of type cosine has none",
        ),
        ('{"optimizer": {"batch_size": 1e999}}', "is not JSON: 1e999 is not a number"),
        ({"network": {"arch": "resnet51"}}, "network.arch is 'resnet51', which is not an architecture; did you mean"),
        ({"training": {"warmup_epochs": 10}}, "training.warmup_epochs is 10, but the run has only 10 epochs: "),
        ({"training": {"warmup_epochs": -1}}, "training.warmup_epochs is -1: must be greater than or equal to 0"),
        ({"network": {"dilation": 2}}, "network.dilation is 2: only networks with dilation 1 are trained"),
        ({"network": {"bn_mode": "inplace"}}, "network.activation relu cannot be inverted.* use leaky_relu"),
        ({"optimizer": {"nesterov": True, "type": "Adam"}}, "optimizer.nesterov needs type SGD"),
        ({"optimizer": {"batch_size": 4}, "training": {"accumulation_steps": 5}}, "accumulation_steps is 5, more than"),
        ({"input": {"scale_val": 200}}, "input.scale_val is 200, less than input.crop_val, which is 224"),
        ({"input": {"mean": 0.5}}, "input.mean is 0.5: must be a valid "),
        ({"input": {"std": [1, 1]}}, "missing field input.std.2"),
        ({"input": {"std": [1, 1, 0]}}, "input.std.2 is 0: must be greater than 0"),
        ({"network": []}, r"network is \[\]: must be an object"),
        ("[1]", r"the content is \[1\]: must be an object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: it is nested deeper"),
        ('{"optimizer": {"learning_rate": NaN}}', "NaN is not a number"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(recipe, content, says):
    with pytest.raises(RecipeError, match=f"recipe.json: .*{says}"):
        recipe(content)


@pytest.mark.parametrize("change", ["optimizer.learning_rate", "=3", "optimizer.batch_size.x=3"])
def test_a_change_that_is_none_is_refused(recipe, change):
    with pytest.raises(RecipeError, match=change.partition("=")[0] or "=3"):
        recipe({"optimizer": {"batch_size": 4}}, change)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=f"{tmp_path}/none.json: cannot be read"):
        read_recipe(tmp_path / "none.json")


def test_keys_of_the_first_release_are_read_with_a_warning(recipe, caplog):
    read = recipe({"training": {"accumulate": 4}, "optimizer": {"batch_size": 8}})
    assert read.training.accumulation_steps == 4
    assert "training.accumulate is now called training.accumulation_steps" in caplog.text
    network = {"arch": "test_resnet_deeplab3", "bn_mode": "inplace", "activation": "elu"}
    section = recipe(
        {"network": network, "segmentation": {"uniform": 0.25, "ignore": 7, "longest_val": 99}}
    ).segmentation
    assert (section.class_balanced, section.ignore_index, section.long_side_val) == (0.25, 7, 99)


@pytest.mark.parametrize("in_file", ["uniform", "class_balanced"])
@pytest.mark.parametrize("changed", ["uniform", "class_balanced"])
def test_a_change_counts_under_either_name(tmp_path, in_file, changed):
    content = json.loads((FOLDER / "test_resnet_deeplab3_iabn.shapes.json").read_text())
    content["segmentation"] = {in_file: 0.5}
    (path := tmp_path / "recipe.json").write_text(json.dumps(content))
    assert read_recipe(path, [f"segmentation.{changed}=0.25"]).segmentation.class_balanced == 0.25


@pytest.mark.parametrize("arch", ["wider_resnet38", "resnet50", "wider_resnet16_a2"])
def test_a_stem_that_the_network_does_not_have_is_ignored_as_ever(recipe, caplog, arch):
    assert "input_3x3" not in recipe({"network": {"arch": arch, "input_3x3": True}}).model_options()
    assert f"network.input_3x3 is ignored: {arch} has only one kind of stem" in caplog.text


def test_the_former_module_gives_the_same():
    with pytest.warns(DeprecationWarning, match="is now iabn_hub.recipes"):
        former = importlib.import_module("iabn_hub.training.recipe")
    assert former.read_recipe is read_recipe
