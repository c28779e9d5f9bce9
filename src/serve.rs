//! The composition root: builds models, engines, service and HTTP server, and runs them until told to stop.
