"""All campaigns, in the order of the report."""

from importlib import import_module

from .harness import Campaign

# Each of these modules has a list CAMPAIGNS.
_MODULES = (
    "bytewise",
    "processes",
    "histories",
    "memory",
    "sentinel",
    "cluster",
    "interrupts",
    "refusals",
    "sealed",
)

CAMPAIGNS: dict[str, Campaign] = {
    campaign.name: campaign
    for module in _MODULES
    for campaign in import_module(f".{module}", __package__).CAMPAIGNS
}
