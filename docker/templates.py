"""Put the templates of the image in place: those given as a build context, or a download.

    python templates.py GIVEN HOME KIND

GIVEN is the build context named ``templates``: a TemplateFlow folder, or empty. KIND is what the
image's label will say: ``templateflow`` is only granted to the very files that TemplateFlow
publishes, so that an image made of other files cannot pass for one that may be published.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

SPACE = "MNI152Lin"
# Size and MD5 of each file: its key in the archive github.com/templateflow/tpl-MNI152Lin.
PUBLISHED = {
    f"tpl-{SPACE}_res-01_T1w.nii.gz": (10669511, "8676d4e6f18f2a76906f279b3fec3ebb"),
    f"tpl-{SPACE}_res-01_desc-brain_mask.nii.gz": (131839, "6a80080a52e92a58540d0103af422275"),
}
ADVICE = (
    "name a folder that holds tpl-MNI152Lin, such as the TEMPLATEFLOW_HOME of a machine with a "
    "connection: --build-context templates=DIR"
)


def main(given: Path, home: Path, kind: str) -> str | None:
    """Fill ``home``; return what is wrong, in one sentence."""
    os.environ["TEMPLATEFLOW_HOME"] = str(home)
    target = home / f"tpl-{SPACE}"
    if (given / target.name).is_dir():
        shutil.copytree(given / target.name, target)
    else:
        try:
            from templateflow import api

            api.get(SPACE, resolution=1, desc=None, suffix="T1w", extension=".nii.gz")
            api.get(SPACE, resolution=1, desc="brain", suffix="mask", extension=".nii.gz")
        except Exception as error:
            return f"The template {SPACE} cannot be downloaded ({type(error).__name__}); {ADVICE}"
    for name, (size, md5) in PUBLISHED.items():
        file = target / name
        if not file.is_file() or not file.stat().st_size:
            return f"The template {SPACE} is not complete, {name} is missing; {ADVICE}"
        content = file.read_bytes()
        print(hashlib.sha256(content).hexdigest(), name)
        same = (
            len(content) == size and hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        )
        if kind == "templateflow" and not same:
            return (
                f"{name} is not the file that TemplateFlow publishes; to build an image for tests "
                "only, add --build-arg TEMPLATES=stand-in, which is what its label will say"
            )
    for path in home.iterdir():  # TemplateFlow leaves an empty skeleton of all templates
        if path != target:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in target.iterdir():
        if path.is_file() and not path.stat().st_size:
            path.unlink()
    for path in (home, *home.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
