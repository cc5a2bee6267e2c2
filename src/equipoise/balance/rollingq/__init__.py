"""RollingQ: query rotation for attention layers."""
