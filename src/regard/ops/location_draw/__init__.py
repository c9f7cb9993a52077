"""One location for each query: drawn or likeliest, checked, and gathered."""

from .api import check_draw, check_locations, draw_location, locations_at

__all__ = ["check_draw", "check_locations", "draw_location", "locations_at"]
