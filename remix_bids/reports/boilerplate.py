"""The methods text of a run, right for its options, with the references that it cites."""

from __future__ import annotations

import re
from html import escape
from importlib import metadata, resources
from pathlib import Path

from remix_bids import __version__
from remix_bids.config import NATIVE, RunConfig
from remix_bids.derivatives import write_text
from remix_bids.experts.registry import FINE_ENOUGH, load_registry
from remix_bids.templates import NILEARN_SPACE

_CITED = re.compile(r"@(\w+)")


def methods_text(config: RunConfig) -> str:
    """What was done, in Markdown; citations as Pandoc reads them (``[@key]``).

    Parameters
    ----------
    config : RunConfig
        Only options that change the result, and the versions installed here, enter the text.
    """
    parts = [_opening(config), _registration(config), _network(config)]
    which = _followed_by_steps(config)
    if which:
        parts.append(
            f"After {which}, what the output left unexplained of the scan was estimated and added, "
            "as in iterative back-projection [@backprojection], unless the scan was noisy."
        )
    parts += [_spaces(config), _quality(config)]
    if config.sloppy:
        parts.append("**The option --sloppy was used: these results are for tests only.**")
    return "\n\n".join(parts)


def _opening(config: RunConfig) -> str:
    chosen = "T1-weighted (T1w) images"
    if config.bids_filter_file is not None:
        chosen = "T1-weighted (T1w) images, chosen by a filter file,"
    return (
        f"{chosen} organised as a BIDS dataset [@bids] were super-resolved to 1 mm isotropic "
        f"voxels with *remix-bids* {__version__}, an independent implementation of the method of "
        f"REMIx [@remix], built on Nipype {_version('nipype')} [@nipype]."
    )


def _registration(config: RunConfig) -> str:
    if config.space == NILEARN_SPACE:
        template = "the skull-stripped ICBM 2009a brain that nilearn carries"
        cited = f"[@{_template_key(config.space)}]"
    else:
        template = f"the template {config.space}, taken from TemplateFlow"
        cited = f"[@templateflow; @{_template_key(config.space)}]"
    return (
        f"Each image was registered to {template} {cited} by an affine "
        f"transform with ANTs (antspyx {_version('antspyx')}) [@ants; @antsx], from several starts "
        f"(random seed {config.random_seed}), and brought to a grid of 181 x 217 x 181 voxels of "
        "1 mm by a linear estimate (ordinary kriging along each axis, given the width of the "
        "slices' profile), which takes off part of their blur. The width of thick slices was "
        "measured in the image, by the blur along its pixels after which it varies there as much "
        "as across its slices, an idea of [@espreso]."
    )


def _network(config: RunConfig) -> str:
    if config.expert == "general":
        which = "one general residual 3D U-Net, trained on all voxel volumes (--expert general),"
    elif config.expert != "auto":
        which = f"the expert for voxel volumes of {config.expert} mm3 (--expert {config.expert})"
    elif config.gate == "paper":
        which = "one of seven expert networks, selected by the product of its voxel sizes,"
    else:
        which = (
            "one of seven expert networks, selected by its effective voxel volume (the product of "
            "the voxel sizes, each counted as at least 1 mm),"
        )
    own = " The networks were trained on openly licensed data, not by the authors of the method."
    if config.experts_dir is not None:
        own = " The networks were not those shipped with remix-bids."
    copy = ""
    if config.expert == "auto":
        copy = (
            f" Images with all voxel sides up to {FINE_ENOUGH} mm were only resampled, by one "
            "cubic B-spline interpolation."
        )
    return (
        f"For each image, {which} predicted what to add to that estimate (the mean of one pass "
        "over it and one over its mirror image), with PyTorch "
        f"{_version('torch')} [@pytorch].{copy}{own} Intensities stayed those of the scanner."
    )


def _followed_by_steps(config: RunConfig) -> str:
    """The networks whose output was made consistent with the scan, in words; '' for none."""
    if config.enforce_consistency:
        return "the network"
    if config.experts_dir is not None:
        return "those networks whose table asks for it"
    names = [
        record.name
        for record in load_registry()
        if record.consistency_steps and config.expert in ("auto", record.name)
    ]
    return f"the networks for {', '.join(names)} mm3" if names else ""


def _spaces(config: RunConfig) -> str:
    texts = []
    if config.output_spaces != (NATIVE,):
        texts.append(f"Images were written in {config.space} space, 0 outside the field of view.")
    if NATIVE in config.output_spaces:
        texts.append(
            "Images were also written in native space, on a 1 mm isotropic grid in the scanner's "
            "world: the acquired image was interpolated once, and what was added to it in template "
            "space (by the linear estimate, the network and its steps) was resampled and added."
        )
        if len(texts) == 1:
            texts[0] = texts[0].replace("also ", "")
    return " ".join(texts)


def _quality(config: RunConfig) -> str:
    text = (
        "The output was taken back through the scan's own acquisition (slice thickness, spacing "
        "and orientation) and held against the acquired voxels in units of the noise; sharpness, "
        "noise, contrast and the anisotropy of resolution were measured before and after."
    )
    if config.leave_slices_out:
        text += (
            " In addition, every second slice was left out, restored from the others, and compared "
            "with the acquired one."
        )
    return text


def _template_key(space: str) -> str:
    if space == "MNI152Lin":
        return "mni152lin"
    return "mni152nlin6" if "NLin6" in space else "mni152nlin2009"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # such as ANTs from conda
        return "(version unknown)"


def references(text: str) -> dict[str, str]:
    """BibTeX entries of all that a text cites, in the order of citation."""
    content = resources.files("remix_bids.data").joinpath("boilerplate.bib").read_text()
    entries = {
        entry.partition("{")[2].partition(",")[0]: entry.strip()
        for entry in re.split(r"\n(?=@)", content)
    }
    return {key: entries[key] for key in dict.fromkeys(_CITED.findall(text))}


def write_boilerplate(config: RunConfig) -> Path:
    """Write ``logs/CITATION.md`` and ``logs/CITATION.bib``; return the former."""
    text = methods_text(config)
    path = config.output_dir / "logs" / "CITATION.md"
    write_text(path, f"# Methods\n\n{text}\n")
    write_text(path.with_suffix(".bib"), "\n\n".join(references(text).values()) + "\n")
    return path


def boilerplate_html(config: RunConfig) -> str:
    """The methods text with numbered references, as an HTML fragment."""
    text = methods_text(config)
    cited = references(text)
    numbers = {key: i for i, key in enumerate(cited, 1)}

    def number(match: re.Match) -> str:
        keys = _CITED.findall(match[0])
        return "[" + ", ".join(str(numbers[key]) for key in keys) + "]"

    text = escape(re.sub(r"\[@[^\]]+\]", number, text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\*(.+?)\*", r"<i>\1</i>", text)
    paragraphs = "".join(f"<p>{part}</p>\n" for part in text.split("\n\n"))
    entries = "".join(f"<li>{_reference_html(entry)}</li>\n" for entry in cited.values())
    return (
        f"{paragraphs}<ol>\n{entries}</ol>\n"
        '<p class="caption">The same text for your paper: logs/CITATION.md and .bib in the output '
        "folder (of the last run that wrote there).</p>\n"
    )


def _reference_html(entry: str) -> str:
    fields = dict(re.findall(r"^\s*(\w+) = \{(.*)\},?$", entry, flags=re.MULTILINE))
    fields = {key: _plain(value) for key, value in fields.items()}
    names = [name.partition(",")[0] for name in fields["author"].split(" and ")]
    names = ["et al." if name == "others" else name for name in names]
    where = fields.get("journal") or fields.get("booktitle", "")
    volume = fields.get("volume", "")
    pages = f":{fields['pages']}" if "pages" in fields else ""
    doi = f"doi:{fields['doi']}" if "doi" in fields else ""
    pieces = [", ".join(names).replace(", et al.", " et al"), fields["title"]]
    pieces += [f"{where} {volume}{pages}".strip(), fields.get("year", ""), doi]
    return escape(". ".join(piece for piece in pieces if piece) + ".")


def _plain(text: str) -> str:
    return (
        text.replace("{\\'e}", "é")
        .replace("{\\'o}", "ó")
        .replace('{\\"a}', "ä")
        .replace("--", "-")
        .translate(str.maketrans("", "", "{}"))
    )
