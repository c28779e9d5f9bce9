//! `eurus bench`: load generator and model timings.
