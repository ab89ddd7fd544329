"""Other programs that turn an arXiv source into text, each behind one function of a folder; `pip install -e .[bench]` brings them."""
import logging
from importlib.util import find_spec
from pathlib import Path

def missing():
    "The peers that are not installed."
    return [name for name in ("arxiv_to_prompt", "arxiv_latex_cleaner", "pylatexenc") if find_spec(name) is None]

def lay_out(files, folder):
    "Write the files of a source below `folder`, as the peers read them."
    for name, text in files.items():
        path = Path(folder)/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

def arxiv_to_prompt(folder, expand=False):
    "Text of a source without comments, inputs joined; None where it finds no main file."
    from arxiv_to_prompt.core import process_latex_source
    return process_latex_source(local_folder=str(folder), keep_comments=False, expand_macros_flag=expand)

def arxiv_to_prompt_main(folder):
    from arxiv_to_prompt.core import find_main_tex
    return find_main_tex(str(folder))

def arxiv_latex_cleaner(folder):
    "Writes FOLDER_arXiv with its defaults: comments, comment environments and \\iffalse are gone, files stay apart."
    from arxiv_latex_cleaner.arxiv_latex_cleaner import run_arxiv_cleaner
    run_arxiv_cleaner(dict(input_folder=str(folder), keep_bib=False, resize_images=False, im_size=500, compress_pdf=False, pdf_im_resolution=500,
                           images_allowlist={}, commands_to_delete=[], commands_only_to_delete=[], environments_to_delete=[], use_external_tikz=None,
                           svg_inkscape=None, convert_png_to_jpg=False, png_quality=50, png_size_threshold=.5, verbose=False))

def pylatexenc(text):
    "Unicode text by a full parse."
    from pylatexenc.latex2text import LatexNodes2Text
    return LatexNodes2Text().latex_to_text(text)

def quietly():
    "Keep the peers' progress off the table."
    logging.disable(logging.WARNING)
