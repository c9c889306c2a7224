'use strict';

// client.py with the real bee-queue: keeps chains of jobs alive and prints, every few seconds, how many jobs missed their
// own event. It is a yardstick and handles no faults: a save that fails ends it.

const Queue = require('bee-queue');
const settings = require('./settings');

const WIND_DOWN_MS = 2000;
const BUCKETS_PER_E = 32; // as in harness/latencies.py

const queue = new Queue(settings.queueName, {
  redis: settings.redis,
  isWorker: false,
  getEvents: true,
  sendEvents: false,
  storeJobs: true,
});

const counts = {
  numJobSaveSuccess: 0,
  numJobSaveError: 0,
  numQueueSucceeded: 0,
  numQueueFailed: 0,
  numJobSucceeded: 0,
};
const latencies = new Map();
let heard = 0;
let underWay = 0;
let started;
let stopping = false;

async function startJob() {
  const job = queue.createJob({timestamp: Date.now()});
  const savedAt = performance.now();
  underWay += 1;
  job.on('succeeded', () => {
    counts.numJobSucceeded += 1;
    remember(performance.now() - savedAt);
  });
  await job.save();
  counts.numJobSaveSuccess += 1;
}

function remember(latencyMs) {
  const bucket = Math.floor(Math.log(latencyMs) * BUCKETS_PER_E);
  latencies.set(bucket, (latencies.get(bucket) || 0) + 1);
  heard += 1;
}

function percentileMs(share) {
  let left = share * heard;
  for (const bucket of [...latencies.keys()].sort((a, b) => a - b)) {
    left -= latencies.get(bucket);
    if (left <= 0) return Number(Math.exp((bucket + 0.5) / BUCKETS_PER_E).toPrecision(3));
  }
  return null;
}

function ended(counter) {
  counts[counter] += 1;
  underWay -= 1;
  if (!stopping) startJob();
}

function printStats() {
  const {numQueueSucceeded, numQueueFailed, numJobSucceeded} = counts;
  const lost = numQueueSucceeded - numJobSucceeded;
  const line = {
    ...counts,
    throughput: ((numQueueSucceeded + numQueueFailed) * 1000 / (performance.now() - started)).toFixed(0),
    numSucceededLost: lost,
    succededLossPercent: (lost * 100 / numQueueSucceeded).toFixed(1),
  };
  if (settings.extendedStats) {
    line.numTracked = queue.jobs.size;
    line.rssKb = Math.round(process.memoryUsage.rss() / 1024);
    line.p50Ms = percentileMs(0.5);
    line.p99Ms = percentileMs(0.99);
  }
  console.log(JSON.stringify(line));
}

async function stop() {
  if (stopping) return;
  stopping = true;
  const deadline = performance.now() + WIND_DOWN_MS;
  while (underWay > 0 && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 20));
  printStats();
  await queue.close();
  process.exit(0);
}

queue.on('job succeeded', () => ended('numQueueSucceeded'));
queue.on('job failed', () => ended('numQueueFailed'));
queue.on('error', (error) => console.error(`client: ${error.message}`));
process.on('SIGTERM', stop);
process.on('SIGINT', stop);
process.on('unhandledRejection', (error) => {
  console.error(`client: ${error.message}`);
  process.exit(1);
});

queue.on('ready', () => {
  console.error(`client: connected; ${settings.numChains} chains, on Node`);
  started = performance.now();
  for (let chain = 0; chain < settings.numChains; chain += 1) startJob();
  setInterval(printStats, settings.statsIntervalMs);
  if (settings.durationMs) setTimeout(stop, settings.durationMs);
});
