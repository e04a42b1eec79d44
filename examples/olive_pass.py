"""onnxgen as a pass of an Olive workflow.

python examples/olive_pass.py model.onnx folder   # needs olive-ai

Olive finds passes by the configuration of a package: PACKAGE says where this one is. In a workflow
of your own put `OnnxgenFusion` between the conversion and quantization, and hand PACKAGE to
`olive.workflows.run`, merged with Olive's own passes as `package()` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.workflows import run

import onnxgen

PACKAGE = {
    "OnnxgenFusion": {
        "module_path": f"{Path(__file__).stem}.OnnxgenFusion",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
    }
}


class OnnxgenFusion(Pass):
    """Attention, norms and rotary embeddings as single operators, proven; see `onnxgen.fuse`."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "target": PassConfigParam(type_=str, default_value="onnx", description="onnx or ort"),
            "padding": PassConfigParam(type_=str, default_value="any", description="with ort"),
            "verify": PassConfigParam(type_=str, default_value="full", description="how much"),
            "disable": PassConfigParam(type_=list, default_value=[], description="codes of rules"),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        output = Path(resolve_onnx_path(output_model_path))
        output.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = config.model_dump()
        result = onnxgen.fuse(model.model_path, output=output, **options)
        print(result)
        # The folder, not the file: large weights lie beside it.
        return ONNXModelHandler(model_path=str(output.parent), onnx_file_name=output.name)


def package() -> dict[str, Any]:
    """Olive's passes, and this one."""
    own = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    return {**own, "passes": {**own["passes"], **PACKAGE}}


def main(model: str, folder: str) -> None:
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": model},
        "passes": {"fuse": {"type": "OnnxgenFusion", "target": "onnx"}},
        "output_dir": folder,
        "cache_dir": f"{folder}/cache",
    }
    output = run(workflow, package_config=package())
    print(output.get_best_candidate().model_path)


if __name__ == "__main__":
    sys.modules[Path(__file__).stem] = sys.modules["__main__"]  # where PACKAGE says it is
    main(*sys.argv[1:])
