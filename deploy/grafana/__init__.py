"""The Grafana dashboards, one file each, built with Grafana's own library. `make dashboards` writes them as JSON."""
