"""The front ends of Bulkhead: gRPC, HTTPS, reviews, configuration, command line."""
