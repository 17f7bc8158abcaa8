"""What a figure shows, said in a sentence by the numbers it was drawn from."""

from collections.abc import Mapping

import pandas as pd


def confused(shares: pd.DataFrame) -> str:
    """Of shares of frames by stage (rows) and by what was said (columns): the hardest stage, and what it is taken for."""
    own = pd.Series({name: shares.loc[name, name] for name in shares.index if shares.loc[name].sum() > 0})
    if own.empty:
        return "no frames to tell stages by"
    if own.min() == 1:
        return "no frame of any stage is taken for another"
    hardest = own.idxmin()
    others = shares.loc[hardest].drop(hardest)
    said = f"hardest: {hardest!r}, {own[hardest]:.0%} of its frames recognised"
    if len(others) and others.max() > 0:
        said += f", {others.max():.0%} taken for {others.idxmax()!r}"
    return said + (f"; easiest: {own.idxmax()!r} ({own.max():.0%})" if len(own) > 1 else "")


def extremes(values: Mapping[str, float] | pd.Series, what: str, digits: int = 3) -> str:
    """The highest and the lowest of named values."""
    values = pd.Series(values, dtype=float).dropna()
    if values.empty:
        return f"no {what} to compare"
    ends = [
        f"{word} {what}: {name} ({values[name]:.{digits}f})"
        for word, name in (("highest", values.idxmax()), ("lowest", values.idxmin()))
    ]
    return "; ".join(ends if len(values) > 1 else [f"{what}: {values.index[0]} ({values.iloc[0]:.{digits}f})"])
