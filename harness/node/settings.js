'use strict';

// The configuration of the programs on Node: config.py's variables, which config.py has already checked.

function connection(url) {
  if (url.startsWith('unix://')) return {path: url.slice('unix://'.length).split('?')[0]};
  return {url};
}

const {env} = process;

module.exports = {
  queueName: env.QUEUE_NAME || 'issue-189',
  concurrency: Number(env.CONCURRENCY || 2),
  numChains: Number(env.NUM_CHAINS || 7),
  redis: connection(env.REDIS_URL || 'redis://127.0.0.1:6379'),
  statsIntervalMs: 1000 * Number(env.STATS_INTERVAL || 3),
  durationMs: 1000 * Number(env.DURATION || 0),
  extendedStats: env.EXTENDED_STATS === 'true',
};
