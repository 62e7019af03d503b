"""A process that measures one step: what kdprof.measure.isolation starts."""

from kdprof.measure.isolation import main

main()
