"""Matrix files: what cells they make, and every fault refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from packloop.bench.matrix import _NEEDED, _MatrixFile, read_matrix, select_cells
from packloop.bench.session import make_plan
from packloop.errors import ConfigError, InputError

ROOT = Path(__file__).resolve().parents[1]


def write(tmp_path: Path, values: dict | str) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def test_named_cells_and_the_product_of_axes(tmp_path):
    path = write(
        tmp_path,
        {
            "base": {"lora": {"r": 8}, "data": {"packing": "bfd"}},
            "set": {"train.seed": 3},
            "synthetic": "tiny",
            "cells": {"plain": None, "wide": {"lora.target_modules": "all-linear", "synthetic": "tinyllama-1.1b"}},
            "axes": {"train.per_device_train_batch_size": [1, 2], "kernels.attention": ["eager", "sdpa"]},
            "exclude": [{"train.per_device_train_batch_size": 2, "kernels.attention": "eager"}],
        },
    )
    matrix = read_matrix(path, ["data.max_length=128"], steps=4)
    assert [cell.name for cell in matrix.cells] == [
        "plain",
        "wide",
        "per_device_train_batch_size=1,attention=eager",
        "per_device_train_batch_size=1,attention=sdpa",
        "per_device_train_batch_size=2,attention=sdpa",
    ]
    assert (matrix.steps, matrix.warmup) == (4, 3)
    for cell in matrix.cells:
        assert (cell.config.lora.r, cell.config.train.seed, cell.config.data.max_length) == (8, 3, 128)
        assert cell.config.data.source == "bundled"  # random weights need no data set of their own
    assert [cell.synthetic for cell in matrix.cells[:3]] == ["tiny", "tinyllama-1.1b", "tiny"]
    assert matrix.cells[1].config.lora.target_modules == "all-linear"
    assert matrix.cells[4].config.kernels.attention == "sdpa"
    assert [cell.name for cell in select_cells(matrix, ["wide", "plain"])] == ["plain", "wide"]


def test_a_base_by_its_path_and_a_data_source_that_it_names(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {source: rows.jsonl}\n")
    path = write(tmp_path, {"base": "run.yaml", "synthetic": "tiny", "cells": {"one": {}}})
    (cell,) = read_matrix(path).cells
    assert cell.config.data.source == "rows.jsonl"


def test_cells_with_the_same_data_and_learning_are_held_to_the_same_steps(tmp_path):
    cells = {
        "eager": {"kernels.attention": "eager"},
        "fused": {"kernels.layer": "fused", "lora.dropout": 0.0},
        "split": {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 2},
        "unpaged": {"train.optim": "adamw_32bit", "train.gradient_checkpointing": 0, "train.memory_budget_gib": 9},
        "bfd": {"data.packing": "bfd"},
        "rate": {"train.learning_rate": 1e-3},
        "shape": {"synthetic": "tinyllama-1.1b"},
        "adapters": {"lora.target_modules": "all-linear"},
        "batch": {"train.per_device_train_batch_size": 4},
    }
    base = {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}}
    path = write(tmp_path, {"base": base, "synthetic": "tiny", "cells": cells})
    plan = make_plan(read_matrix(path))
    keys = {cell.name: cell.reference for cell in plan.cells}
    assert len({keys[name] for name in ("eager", "fused", "split", "unpaged")}) == 1
    assert len(set(keys.values())) == len(plan.references) == 6
    reference = plan.references[keys["eager"]].config
    assert reference["kernels"]["attention"] == "eager"
    assert reference["kernels"]["layer"] == "stock"
    assert reference["lora"]["dropout"] == 0
    train = reference["train"]
    assert (train["per_device_train_batch_size"], train["gradient_accumulation_steps"]) == (1, 2)

    path = write(tmp_path, {"base": base, "synthetic": "tiny", "cells": cells, "reference": "fused"})
    assert {planned.config["kernels"]["layer"] for planned in make_plan(read_matrix(path)).references.values()} == {
        "fused"
    }
    path = write(tmp_path, {"base": base, "synthetic": "tiny", "cells": cells, "gate": False})
    assert make_plan(read_matrix(path)).references == {}


ONE = {"synthetic": "tiny", "cells": {"one": {}}}
FAULTS = {
    "empty": ({"base": {}}, "the matrix is empty"),
    "empty file": ("", "the matrix is empty"),
    "no cell in cells": ({"cells": {}}, "the matrix is empty"),
    "axis without values": (
        {"axes": {"train.seed": []}},
        r"axes=\{'train.seed': \[\]\}: .* lists of values, .* is needed",
    ),
    "all excluded": ({"axes": {"train.seed": [1]}, "exclude": [{"train.seed": 1}]}, "the matrix is empty"),
    "unknown key": (ONE | {"axis": {}}, r"axis=\{\}: no such key; nearest: axes"),
    "unknown setting": (
        ONE | {"cells": {"one": {"kernels.atention": "eager"}}},
        "cell one: kernels.atention='eager': no such setting; nearest: kernels.attention",
    ),
    "unknown section": (ONE | {"cells": {"one": {"kernel.attention": "eager"}}}, "no such section"),
    "a key of the matrix in a cell": (
        ONE | {"cells": {"one": {"steps": 3}}},
        "cell one: steps=3: this is no setting of a run but a key of the matrix$",
    ),
    "a key of cells as a setting": (
        ONE | {"set": {"synthetic": "tiny"}},
        "synthetic='tiny': .* a key of the matrix or of a cell",
    ),
    "no section": (ONE | {"cells": {"one": {"attention": "eager"}}}, "section.key is needed"),
    "value": (ONE | {"cells": {"one": {"kernels.attention": "flash"}}}, "cell one: kernels.attention='flash': allowed"),
    "settings at odds": (
        ONE | {"cells": {"one": {"kernels.attention": "cudnn", "data.packing": "bfd"}}},
        "cell one: data.packing=bfd keeps documents apart",
    ),
    "unknown setting in base": (ONE | {"base": {"train": {"batch": 1}}}, r"base: train.batch=1: no such setting"),
    "unknown axis": ({"axes": {"train.sed": [1]}}, "cell sed=1: train.sed=1: no such setting; nearest: train.seed"),
    "same name twice": ("cells: {one: {}, one: {}}", "the key 'one' is given twice"),
    "same name by axes": ({"axes": {"data.source": ["a b", "a/b", "b"]}}, "two cells are called 'source=b'"),
    "a name that is no file name": (ONE | {"cells": {"../one": {}}}, "is no file name"),
    "missing reference": (ONE | {"reference": "on"}, "reference='on': no such cell; nearest: one"),
    "exclude without axes": (ONE | {"exclude": [{"train.seed": 1}]}, "the matrix has no axes"),
    "exclude of nothing": (
        {"axes": {"train.seed": [1]}, "exclude": [{"train.seed": 2}]},
        "leaves out nothing",
    ),
    "steps": (ONE | {"steps": 0}, "steps=0: a whole number of steps, 1 or more, is needed"),
    "gate": (ONE | {"gate": -1}, "gate=-1: a tolerance above 0 in nats a label, or false is needed"),
    "a number as base": (
        ONE | {"base": 3},
        r"^\S*matrix\.yaml: base=3: a configuration's path from this file, or a mapping of its sections is needed$",
    ),
    "a list as base": (ONE | {"base": ["run.yaml"]}, r"base=\['run.yaml'\]: a configuration's path"),
    "a missing base": (
        ONE | {"base": "run.yaml"},
        r"matrix\.yaml: base run\.yaml: configuration '.*run.yaml' does not",
    ),
    "a number as cells": (ONE | {"cells": 3}, "cells=3: a mapping of names to settings"),
    "a number as a cell": (ONE | {"cells": {"one": 3}}, r"cells=\{'one': 3\}: a mapping of names to settings"),
    "a text as floor": (ONE | {"floor": "yes"}, "floor='yes': true or false is needed"),
    "no adapters": (
        ONE | {"cells": {"one": {"lora.enabled": False, "model.quantization": "none", "model.dtype": "float32"}}},
        "cell one: lora.enabled=false",
    ),
    "synthetic": (
        {"cells": {"fine": {}, "one": {"synthetic": "llama9"}}},
        r"^\S*matrix\.yaml: cell one: model shape 'llama9' is neither llama2-7b, ",
    ),
    "synthetic of all": (
        ONE | {"synthetic": "./llama9"},
        r"^\S*matrix\.yaml: cell one: model shape '\./llama9' is neither",
    ),
    "tokenizer": ({"cells": {"one": {"tokenizer": 3}}}, "tokenizer=3: a name or a directory is needed"),
    "a list": ("[1, 2]", r"a mapping of the matrix's keys \(base, set, .* is needed, given \[1, 2\]"),
    "no YAML": ("cells: {one", "while parsing"),
}


@pytest.mark.parametrize(("values", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(tmp_path, values, message):
    with pytest.raises(InputError, match=message) as caught:
        read_matrix(write(tmp_path, values))
    assert "\n" not in str(caught.value)


def test_every_key_of_the_file_has_words_for_what_it_needs():
    assert set(_NEEDED) == set(_MatrixFile.model_fields)


def test_faults_of_a_base_in_its_own_file_name_both_files(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {batch: 1}\n")
    with pytest.raises(ConfigError, match=r"matrix\.yaml: base run\.yaml: train\.batch=1: no such setting"):
        read_matrix(write(tmp_path, ONE | {"base": "run.yaml"}))


def test_a_missing_file_and_one_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"matrix '.*none.yaml' does not exist; docs/benchmarks.md describes one"):
        read_matrix(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"a \.yaml file is needed"):
        read_matrix(tmp_path / "matrix.json")


def test_a_shape_on_the_command_line_is_said_to_be_from_there(tmp_path):
    with pytest.raises(ConfigError, match=r"^--synthetic: model shape 'llama9' is neither"):
        read_matrix(write(tmp_path, ONE), synthetic="llama9")


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"model_type": "gpt2"}', "is of model_type 'gpt2'; 'llama' is needed"), ("[", "its config.json cannot be read")],
)
def test_a_directory_s_shape_is_refused_unless_it_is_a_llama_s(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"cell one: model shape '{tmp_path}'.* {words}"):
        read_matrix(write(tmp_path, ONE | {"synthetic": str(tmp_path)}))


def test_the_command_line_cannot_set_what_a_cell_sets_for_itself(tmp_path):
    path = write(tmp_path, {"synthetic": "tiny", "cells": {"one": {"train.seed": 1}, "two": {"synthetic": "tiny"}}})
    with pytest.raises(ConfigError, match=r"train\.seed is set by cell one"):
        read_matrix(path, ["train.seed=2"])
    with pytest.raises(ConfigError, match="synthetic is set by cell two"):
        read_matrix(path, synthetic="llama2-7b")
    for text in ("train.seed", "seed=3"):
        with pytest.raises(ConfigError, match=f"override '{text}': section.key=value is needed"):
            read_matrix(path, [text])
    with pytest.raises(ConfigError, match="--only three: no such cell; allowed: one, two"):
        select_cells(read_matrix(path), ["three"])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda path: path.name)
def test_matrices_of_the_repository(path):
    matrix = read_matrix(path)
    assert matrix.cells
    make_plan(matrix)
