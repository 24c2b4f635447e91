"""`route_plan`: from chosen expert ids to everything an expert kernel asks about the routing."""

from moe_kit_kernels.route_plan.plan import RoutePlan, route_plan, route_plan_pairs

__all__ = ["RoutePlan", "route_plan", "route_plan_pairs"]
