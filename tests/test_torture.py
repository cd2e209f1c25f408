"""A short form of every campaign of `make torture`."""

import pytest

from .torture.campaigns import CAMPAIGNS
from .torture.harness import Campaign, carry_out


@pytest.mark.parametrize("campaign", [pytest.param(c, id=name) for name, c in CAMPAIGNS.items()])
def test_a_short_campaign(campaign: Campaign) -> None:
    """Whatever fault the campaign brings about, nothing comes out wrong."""
    tally = carry_out(campaign, 1, campaign.short)
    assert tally.wrong == []
    assert all(tally.did.values())
