"""All faults of the grammar."""

from miniawq.oracle.planted.formats import roundings_of_scales, roundings_of_weights, steps_of_products
from miniawq.oracle.planted.grammar import Bred, changed_results
from miniawq.oracle.planted.habits import accepted, stateful
from miniawq.oracle.planted.readers import files, searching

FAMILIES = (
    changed_results,
    roundings_of_weights,
    roundings_of_scales,
    steps_of_products,
    accepted,
    stateful,
    files,
    searching,
)


def grammar() -> list[Bred]:
    """Every fault of every family, in the order of the families."""
    return [fault for family in FAMILIES for fault in family()]
