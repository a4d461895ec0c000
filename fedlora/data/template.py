r"""Text made from several columns of a row by a Jinja template, such as ``{{ instruction }}\n{{ input }}``."""

from __future__ import annotations

import pandas as pd
from jinja2 import StrictUndefined, TemplateError, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

from fedlora.errors import InputError


def is_template(text: str) -> bool:
    """Whether a setting is a template rather than the name of a column."""
    return "{{" in text or "{%" in text


def render(template: str, table: pd.DataFrame, setting: str, path: str | None) -> pd.Series:
    """Fill ``template`` with every row of ``table``; the columns are its variables.

    Missing values are the empty text, so that ``{% if input %}`` works. The result ``[rows]`` is stripped.

    Raises:
        InputError: the template is wrong or speaks of a column that is not there.
    """
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    columns = [str(name) for name in table.columns]
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
        places = [place for place, column in enumerate(columns) if column in used]
        compiled = environment.from_string(template)
        picked = table.iloc[:, places].astype(object)
        rows = picked.where(picked.notna(), "").itertuples(index=False, name=None)
        names = [columns[place] for place in places]
        texts = [compiled.render(dict(zip(names, row, strict=True))).strip() for row in rows]
    except UndefinedError as error:
        place = f" of {path!r}" if path else ""
        raise InputError(
            f"{setting}: {error.message}. The template can use these columns{place}: {', '.join(columns)}."
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{setting} = {template!r} is not a template that fits the data: {error}.") from error
    # Without columns there is nothing to iterate over: a constant, the same for every row.
    return pd.Series(texts if places else [compiled.render().strip()] * len(table), dtype=object)
