"""Methods that transform the Deltas, merge them by another method, and transform the result back."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mergekit_bert.adapters.delta import Delta, norm, zero
from mergekit_bert.composing.method import METHODS, Site, make_options
from mergekit_bert.composing.spaces import Leave

Enter = Callable[[Site], tuple[Site, Leave]]
"""The site as the inner method is to see it, and the way back. At least one of its Deltas is not zero."""

INNER = ("task_arithmetic", "ties", "breadcrumbs", "tsv", "iso_c", "iso_cts", "wudi")
"""Methods that need nothing but Deltas, draw nothing and frame no others. They keep their own defaults."""


def merge_within(site: Site, enter: Enter) -> Delta:
    """Transform the site, merge by ``site.options.inner``, and transform the result back."""
    here = _present(site)
    if not here.deltas:
        return zero(site.deltas[0].shape)
    method = METHODS.get(site.options.inner)
    inner, leave = enter(here)
    return leave(method.merge(replace(inner, options=make_options(method, {}))))


def survey_within(sites: Sequence[Site], enter: Enter) -> Any:
    """The inner method's own survey, of the sites as it sees them."""
    if not sites:
        return None
    method = METHODS.get(sites[0].options.inner)
    if method.survey is None:
        return None
    entered = [enter(here)[0] for here in map(_present, sites) if here.deltas]
    return method.survey([replace(site, options=make_options(method, {})) for site in entered])


def _present(site: Site) -> Site:
    """The site without what is zero there, by its Delta or by its weight: it shares no directions with anyone."""
    kept = [place for place, delta in enumerate(site.weighted) if norm(delta) > 0]
    return replace(
        site,
        names=[site.names[place] for place in kept],
        deltas=[site.deltas[place] for place in kept],
        weights=[site.weights[place] for place in kept],
        statistics=(),
    )
