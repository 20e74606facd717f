"""Set up the virtual environment that the Makefile's targets run in.

It needs Python, its venv module and a package index, and nothing else: this runs before anything is installed.
"""

import argparse
import importlib.util
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

if sys.version_info < (3, 11):  # noqa: UP036 - pip would say it too, but after a minute and less clearly
    sys.exit(
        "revcore needs Python 3.11 or newer; {} is {}.{}.\n"
        "If you have a newer one, name it: make PYTHON=python3.12 ...".format(sys.executable, *sys.version_info)
    )


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def run(*command: str | Path, quiet: bool = False) -> bool:
    """Run a command and return whether it succeeded; `quiet` is for one that may well fail."""
    stderr = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr).returncode == 0


def create_venv(venv: Path, system_site_packages: bool) -> None:
    """Create the environment, unless a working one is there."""
    python = venv / "bin" / "python"
    if python.exists() and run(python, "-c", "import pip", quiet=True):
        return
    options = ["--clear"]
    if system_site_packages:
        options += ["--system-site-packages"]
    if importlib.util.find_spec("ensurepip") is None:  # as on Debian, which packs it apart
        if not (system_site_packages and importlib.util.find_spec("pip")):
            sys.exit(
                f"{sys.executable} cannot create virtual environments: its ensurepip module is missing.\n"
                "On Debian or Ubuntu: apt install python3-venv"
            )
        options += ["--without-pip"]
    say(f"creating {venv} with Python {sys.version.split()[0]}")
    if not run(sys.executable, "-m", "venv", *options, venv):
        sys.exit(f"Could not create {venv} (see above).")


def pip_install(venv: Path, *arguments: str | Path, quiet: bool = False) -> bool:
    verbosity = [] if sys.stdout.isatty() else ["-qq"]  # for a log, errors alone: progress bars are for people
    pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    # half of the time went into compiling modules, most of which nobody imports; Python compiles those that are
    return run(*pip, "--no-compile", *verbosity, *arguments, quiet=quiet)


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and run("nvidia-smi", "-L", quiet=True)


def install_cpu_torch(venv: Path) -> None:
    """Install the CPU build of PyTorch: on Linux, PyPI's own brings gigabytes of CUDA, of no use without a GPU."""
    pinned = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned, f"{CONSTRAINTS} pins no torch"
    requirement = f"torch=={pinned[1]}+cpu"
    say(f"no NVIDIA GPU: installing {requirement}")
    # No package index but PyTorch's has such builds, yet pip may be set up here with a mirror or a folder of wheels
    # that has, and PyTorch's may be out of reach: ask pip first. Without dependencies, lest they come from there too.
    if pip_install(venv, "--no-deps", requirement, quiet=True):
        return
    if not pip_install(venv, "--no-deps", "--index-url", TORCH_CPU_INDEX, requirement):
        say("found no CPU build of torch: going on with the default one, which is large but works without a GPU")


def install_deepspeed(venv: Path) -> None:
    """Build DeepSpeed, which comes as source, against the torch that is here: pip's own way would download another."""
    say("building DeepSpeed")
    pinned = ["--constraint", CONSTRAINTS]
    # its setup.py asks for torch, and says nothing of it; what it compiles, it compiles when it is first used
    if not (
        pip_install(venv, *pinned, "torch", "setuptools")
        and pip_install(venv, *pinned, "--no-build-isolation", "deepspeed")
    ):
        sys.exit(
            "Could not install DeepSpeed (see above); the next make tries again. EXTRAS=torch,jax goes without it."
        )


def install_pinned(venv: Path, extras: str) -> None:
    """Install the versions in constraints.txt."""
    wanted = set(extras.split(","))
    needs_torch = not {"torch", "deepspeed", "dev", "hf"}.isdisjoint(wanted)
    if needs_torch and sys.platform == "linux" and not has_nvidia_gpu():
        install_cpu_torch(venv)
    if not {"deepspeed", "dev"}.isdisjoint(wanted):
        install_deepspeed(venv)
    say(f"installing revcore-nn[{extras}] and what it needs, as pinned in constraints.txt")
    if not pip_install(venv, "--constraint", CONSTRAINTS, "--editable", f".[{extras}]"):
        sys.exit("Could not install what revcore needs (see above); the next make tries again.")


def install_on_system(venv: Path, extras: str) -> None:
    """Install only what the machine lacks, in any version; where there is no index, go on without."""
    # The checkout joins the path by hand, for no build backend may be there to install it with. If this Python is in
    # a virtual environment itself, so do its packages: --system-site-packages means those of the Python under it.
    lines = [str(ROOT)]
    if sys.prefix != sys.base_prefix:
        lines += [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))
    (site_packages / "revcore-checkout.pth").write_text("\n".join(lines) + "\n")
    say(f"adding what this machine lacks of revcore-nn[{extras}]")
    if not pip_install(venv, "--retries", "1", "--timeout", "10", "--editable", f".[{extras}]"):
        say("could not install that (no package index?): going on with what is here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", help="where the environment is or will be")
    parser.add_argument("extras", help="the extras of revcore-nn to install, separated by commas")
    parser.add_argument("--system-site-packages", action="store_true", help="use this Python's own packages, unpinned")
    arguments = parser.parse_args()
    venv = ROOT / arguments.venv
    create_venv(venv, arguments.system_site_packages)
    install = install_on_system if arguments.system_site_packages else install_pinned
    install(venv, arguments.extras)
    say("ready")


if __name__ == "__main__":
    main()
