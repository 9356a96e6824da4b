"""Pages of one HTML file that asks for nothing from a network: templates, and Markdown with its images inside."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def page(package: str, template: str, **values: Any) -> str:
    """A template of a package, with the frame that all pages have; every value is escaped.

    Args:
        package: with a folder ``templates``.
        template: name of the file there; it extends ``page.html.j2``.
        **values: that it names.
    """
    import jinja2

    loaders = [jinja2.PackageLoader(name, "templates") for name in dict.fromkeys([package, "agwm_jax.report"])]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def html_of(markdown: str, images: Mapping[str, Path]) -> Any:
    """Markdown as HTML that a template takes as it is: HTML in it stays text, tables sort, PNG images are inside.

    Args:
        markdown: CommonMark with tables.
        images: files by the name that the text has for them; of any other image its text alone is left.
    """
    from markdown_it import MarkdownIt
    from markupsafe import Markup, escape

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer, tokens, index, options, env) -> str:
        token = tokens[index]
        text = escape(renderer.renderInlineAsText(token.children, options, env))
        file = images.get(token.attrs["src"])
        if file is None:
            return str(text)
        return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table class="sortable">')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return Markup(parser.render(markdown))
