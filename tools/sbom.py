#!/usr/bin/env python
"""Write the bill of materials of an installation of iabn-hub: every package that pip installed for it, as CycloneDX.

    python tools/sbom.py                      prints it
    python tools/sbom.py sbom.cdx.json        writes it
    python tools/sbom.py --extras train,hub   with what these extras install

Versions, licences and dependencies are those of the environment that runs this. The same environment gives the same
bytes. tools/build_wheel.py puts it into the wheels, as iabn_hub-*.dist-info/sboms/iabn_hub.cdx.json (PEP 770).
"""

import argparse
import json
import sys
import uuid
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "iabn-hub"


def installed_for(package, extras=()):
    """{name: names of the packages it needs here} of a package and all that it needs, with these extras of the first.

    Raises:
        PackageNotFoundError: something is not installed.
    """
    found, waiting = {}, [(canonicalize_name(package), frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        needs = found.setdefault(name, set())
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            needed = canonicalize_name(requirement.name)
            if needed != name:
                needs.add(needed)
            each = needed, frozenset(requirement.extras)
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return found


def document(package=PACKAGE, extras=()):
    """The bill as a dict, without anything that depends on the time."""
    needs = installed_for(package, extras)
    root = canonicalize_name(package)
    components = {name: component(name) for name in sorted(needs)}
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {**components.pop(root), "type": "library"}},
        "components": list(components.values()),
        "dependencies": [
            {"ref": purl(name), "dependsOn": sorted(map(purl, needed))} for name, needed in sorted(needs.items())
        ],
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {**content, "serialNumber": f"urn:uuid:{number}"}


def component(name):
    metadata = distribution(name).metadata
    licence = metadata.get("License-Expression") or _classified(metadata) or metadata.get("License", "")
    found = {"type": "library", "bom-ref": purl(name), "name": name, "version": distribution(name).version}
    if licence and len(licence) < 100:  # else it is the text
        found["licenses"] = [{"license": {"name": licence}}]
    return {**found, "purl": purl(name)}


def _classified(metadata):
    classes = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    return ", ".join(sorted(set(classes) - {"OSI Approved"}))


def purl(name):
    return f"pkg:pypi/{name}@{distribution(name).version.replace('+', '%2B')}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="file to write (default: standard output)")
    parser.add_argument("--extras", default="", help="extras of iabn-hub, with commas between them")
    given = parser.parse_args()
    try:
        text = json.dumps(document(extras=[e for e in given.extras.split(",") if e]), indent=1) + "\n"
    except PackageNotFoundError as e:
        print(f"sbom: {e}: install iabn-hub with these extras first", file=sys.stderr)
        return 1
    if given.out:
        given.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
