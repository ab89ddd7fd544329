"""Sphinx: notebooks come executed from build.py; everything a page loads is served from the site itself."""
from importlib.util import find_spec
from pathlib import Path

import plotly
from arxiv_study import __version__

project, author, copyright = "arxiv_study", "The arxiv_study founders", "The arxiv_study founders"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["_*"]
templates_path = ["_templates"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # CommonMark has no tables
nb_output_stderr = "show"
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4

html_theme = "pydata_sphinx_theme"
html_title = "arxiv_study"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_sidebars = {"**": ["rooms.html"]}
html_theme_options = {
    "navbar_center": [],
    "navbar_persistent": ["search-button-field"],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "article_header_start": ["breadcrumbs"],
    "footer_start": ["footer-note.html"], "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light", "pygments_dark_style": "a11y-high-contrast-dark",
    "back_to_top_button": False,
}
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent/"static"/"mathjax"/"tex-svg-full.js"
html_static_path = ["_static", str(mathjax), str(Path(plotly.__file__).parent/"package_data"/"plotly.min.js")]
mathjax_path = mathjax.name
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "local"}}
html_context = {"default_mode": "auto"}  # unsaid, the theme complains in the console of every first visit
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
