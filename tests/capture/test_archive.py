from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xformopt.capture.archive import check_pt2, load_pt2
from xformopt.errors import CaptureError

Entries = dict[str, bytes]


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, float("-inf")]))
        self.scale = torch.ones(4)

    def forward(self, x: torch.Tensor, others: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        states = self.linear(x) * self.scale + others["y"][0].sum(-1, keepdim=True)
        return {"twice": torch.cat([states, states]), "masked": (states + self.mask).softmax(-1)}


def inputs() -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    return torch.ones(6, 4), {"y": [torch.ones(6, 2)]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=2)
    dynamic = ({0: batch}, {"y": [{0: batch}]})
    program = torch.export.export(Small().eval(), inputs(), dynamic_shapes=dynamic)
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    torch.export.save(program, path, extra_files={"readme.txt": "hello"})
    return path


@pytest.fixture
def doctor(original: Path, tmp_path: Path) -> Callable[[Callable[[Entries], object]], Path]:
    """Write a copy of the archive whose entries have been edited."""

    def write(edit: Callable[[Entries], object]) -> Path:
        with zipfile.ZipFile(original) as archive:
            entries = {name.removeprefix("small/"): archive.read(name) for name in archive.namelist()}
        edit(entries)
        path = tmp_path / "small.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(f"small/{name}", data)
        return path

    return write


def refuse(path: Path, *fragments: str) -> None:
    with pytest.raises(CaptureError) as caught:
        load_pt2(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message


class Payload:
    """Creates a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def payload_pickle(target: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Payload(target),), buffer)
    return buffer.getvalue()


def test_round_trip(original: Path) -> None:
    program = load_pt2(original)
    expected = torch.export.load(original).module()(*inputs())
    assert torch.equal(program.module()(*inputs())["twice"], expected["twice"])


def test_rewritten_archive_still_loads(doctor: Any) -> None:
    load_pt2(doctor(lambda entries: None))


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.pt2", "no file", "absent.pt2")


def test_not_a_zip(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("not a model")
    refuse(tmp_path / "text.pt2", "not a .pt2 archive")


@pytest.mark.parametrize("keep", [0, 10, 500, -1, -30])
def test_truncated(keep: int, original: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(original.read_bytes()[:keep])
    refuse(path, "cut.pt2")


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("docs/readme.txt", "hello")
    refuse(path, "not a .pt2 archive")


def test_a_checkpoint_is_not_a_pt2(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt2")
    refuse(tmp_path / "weights.pt2", "not a .pt2 archive", "models/model.json")


@pytest.mark.parametrize("entry", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"])
def test_payload_in_a_pickled_entry(entry: str, doctor: Any, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    path = doctor(lambda entries: entries.update({entry: payload_pickle(target)}))
    refuse(path, f'"{entry}"', "could run code")
    assert not target.exists()


@pytest.mark.parametrize("config", ["weights", "constants"])
def test_payload_in_a_tensor_marked_as_pickled(config: str, doctor: Any, tmp_path: Path) -> None:
    target = tmp_path / "pwned"

    def edit(entries: Entries) -> None:
        name = f"data/{config}/model_{config}_config.json"
        table = json.loads(entries[name])
        payload = next(iter(table["config"].values()))
        payload["use_pickle"] = True
        entries[name] = json.dumps(table).encode()
        entries[f"data/{config}/{payload['path_name']}"] = payload_pickle(target)

    refuse(doctor(edit), f"data/{config}/", "could run code")
    assert not target.exists()


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0", "../weights/weight_0", "tensor_99"])
def test_payload_in_an_object(name: str, doctor: Any, tmp_path: Path) -> None:
    target = tmp_path / "pwned"

    def edit(entries: Entries) -> None:
        config = "data/constants/model_constants_config.json"
        table = json.loads(entries[config])
        table["config"]["object"] = {"path_name": name, "is_param": False, "use_pickle": True}
        entries[config] = json.dumps(table).encode()
        if "_obj_" in name:
            entries[f"data/constants/{name}"] = pickle.dumps(Payload(target))

    refuse(doctor(edit), "data/constants/")
    assert not target.exists()


def edit_graph(change: Callable[[Any], object]) -> Callable[[Entries], None]:
    def edit(entries: Entries) -> None:
        graph = json.loads(entries["models/model.json"])
        change(graph)
        entries["models/model.json"] = json.dumps(graph).encode()

    return edit


def first_expression(graph: Any) -> dict[str, Any]:
    values = graph["graph_module"]["graph"]["tensor_values"]["x"]
    return values["sizes"][0]["as_expr"]


def set_node(graph: Any, key: str, value: object) -> None:
    graph["graph_module"]["graph"]["nodes"][0][key] = value


def set_spec(graph: Any, **node: object) -> None:
    tree = {"type": "builtins.dict", "context": "[]", "children_spec": [], **node}
    graph["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])


CODE = "__import__('os').mkdir({target!r})"
ATTACKS: dict[str, Callable[[Any, str], object]] = {
    "shape expression": lambda graph, code: first_expression(graph).update(expr_str=code),
    "nested in a shape expression": lambda graph, code: first_expression(graph).update(expr_str=f"Max(1, {code})"),
    "a string in a shape expression": lambda graph, code: first_expression(graph).update(expr_str=f"Max(1, {code!r})"),
    "range": lambda graph, code: graph["range_constraints"].update({code: {"min_val": 1, "max_val": 2}}),
    "guard": lambda graph, code: graph["guards_code"].append(code),
    "guard attribute": lambda graph, code: graph["guards_code"].append("L['x'].__class__ == 1"),
    "guard lambda": lambda graph, code: graph["guards_code"].append("(lambda: 1)()"),
    "operator": lambda graph, code: set_node(graph, "target", "torch.os.system"),
    "loading operator": lambda graph, code: set_node(graph, "target", "torch.hub.load"),
    "file operator": lambda graph, code: set_node(graph, "target", "torch.ops.aten.from_file.default"),
    "attribute operator": lambda graph, code: set_node(graph, "target", "_operator.attrgetter"),
    "value name": lambda graph, code: set_node(graph, "name", f"x = {code}"),
    "input name": lambda graph, code: graph["graph_module"]["graph"]["inputs"][-1]["as_tensor"].update(name=code),
    "parameter name": lambda graph, code: graph["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
        parameter_name=f'"]; {code}'
    ),
    "argument name": lambda graph, code: graph["graph_module"]["module_call_graph"][0]["signature"].update(
        forward_arg_names=[code]
    ),
    "key": lambda graph, code: graph["graph_module"]["graph"]["tensor_values"].update({code: {}}),
    "hidden by a name": lambda graph, code: graph["graph_module"]["graph"]["tensor_values"].update(
        metadata={"sizes": [{"as_expr": {"expr_str": code}}]}
    ),
    "factory": lambda graph, code: set_spec(
        graph,
        type="collections.defaultdict",
        context={"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []},
    ),
    "enumeration": lambda graph, code: set_spec(
        graph, context='[{"__\\u0065num__": true, "fqn": "antigravity:X", "name": "x"}]'
    ),
    "tree": lambda graph, code: graph["graph_module"]["module_call_graph"][0]["signature"].update(out_spec=code),
}


@pytest.mark.parametrize("attack", ["pickle", "shape expression"])
def test_attacks_work_on_the_plain_loader(attack: str, doctor: Any, tmp_path: Path) -> None:
    """Without the check the payload runs, so the tests beside this one test something."""
    target = tmp_path / "pwned"
    if attack == "pickle":
        path = doctor(lambda entries: entries.update({"data/sample_inputs/model.pt": payload_pickle(target)}))
    else:
        code = CODE.format(target=str(target))
        path = doctor(edit_graph(lambda graph: ATTACKS[attack](graph, code)))
    with pytest.raises(Exception):  # noqa: B017, PT011
        torch.export.load(path)
    assert target.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_the_graph(attack: str, doctor: Any, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    code = CODE.format(target=str(target))
    refuse(doctor(edit_graph(lambda graph: ATTACKS[attack](graph, code))), '"models/model.json"')
    assert not target.exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_graph_is_not_json(content: bytes, doctor: Any) -> None:
    refuse(doctor(lambda entries: entries.update({"models/model.json": content})), "not valid JSON")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "a/../../b",
        "data\\weights",
        "C:/x",
        "data/aotinductor/model/a.so",
        "other.py",
        "models/b.json",
    ],
)
def test_entries_that_do_not_belong(name: str, doctor: Any) -> None:
    refuse(doctor(lambda entries: entries.update({name: b"x"})), name)


@pytest.mark.parametrize("name", ["models/model.json", "archive_format", "data/sample_inputs/model.pt"])
def test_missing_entry(name: str, doctor: Any) -> None:
    refuse(doctor(lambda entries: entries.pop(name)), name)


def test_missing_weight(doctor: Any) -> None:
    refuse(doctor(lambda entries: entries.pop("data/weights/weight_0")), "weight_0")


@pytest.mark.parametrize("length", [0, 4, 61])
def test_weight_of_the_wrong_length(length: int, doctor: Any) -> None:
    refuse(doctor(lambda entries: entries.update({"data/weights/weight_0": bytes(length)})), "small.pt2")


def test_weights_that_are_not_finite(doctor: Any) -> None:
    nan = torch.full((4, 4), float("nan")).numpy().tobytes()
    refuse(doctor(lambda entries: entries.update({"data/weights/weight_0": nan})), '"linear.weight"', "16 of 16")


def test_unregistered_operator(doctor: Any) -> None:
    path = doctor(edit_graph(lambda graph: set_node(graph, "target", "torch.ops.xf.absent.default")))
    refuse(path, "cannot load it")


def append(original: Path, tmp_path: Path, info: zipfile.ZipInfo, data: bytes) -> Path:
    path = tmp_path / "copy.pt2"
    path.write_bytes(original.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, data)
    return path


def test_link(original: Path, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("small/extra/link")
    info.external_attr = 0o120777 << 16
    refuse(append(original, tmp_path, info, b"/etc/passwd"), "small/extra/link", "is a link")


def test_compressed_entry(original: Path, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("small/extra/bomb")
    info.compress_type = zipfile.ZIP_DEFLATED
    refuse(append(original, tmp_path, info, bytes(100_000)), "small/extra/bomb", "is compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_entry(original: Path, tmp_path: Path) -> None:
    refuse(append(original, tmp_path, zipfile.ZipInfo("small/models/model.json"), b"{}"), "occurs twice")


def test_check_does_not_load(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("loaded"))
    check_pt2(original)
