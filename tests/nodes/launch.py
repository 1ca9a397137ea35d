"""Starts a ComfyUI as its main.py does, without torchvision's compiled half: launch.py COMFYUI [OPTIONS OF main.py]"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from comfyui import define_torchvision_operators

    define_torchvision_operators()
    comfyui = Path(sys.argv[1]).resolve()
    sys.path[:] = [str(comfyui), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]
    sys.argv = [str(comfyui / "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
