/** Wall clock in nanoseconds since the epoch. The real one is clock_gettime(CLOCK_REALTIME) through the addon:
 * a millisecond clock can fall before the caller's own start time. */
export interface Clock {
  now(): bigint;
}
