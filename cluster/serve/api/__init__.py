"""The endpoints of the service: one router for each group of calls, listed in `app.ROUTERS`."""
