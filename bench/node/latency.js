'use strict';

// One job at a time to a worker in another process, under the rules of bench/contestants/latency.py. bee-queue sometimes
// loses a job's own event (its issue 189): such a job is given up after a second, counted as `lost`, and in no percentile.

const Queue = require('bee-queue');
const {order, redis, report} = require('./order');

const LOOK_EVERY_MS = 1_000;
const queue = new Queue(order.queue, {redis, isWorker: false, getEvents: true, sendEvents: false, storeJobs: true});

async function main() {
  await queue.ready();
  let latencies = [];
  let current;
  let seen;
  let giveUp;
  let lost = 0;
  const watch = setInterval(() => {
    if (current === seen) giveUp(true);
    seen = current;
  }, LOOK_EVERY_MS);
  for (let n = 0; n < order.warm_up + order.jobs; n += 1) {
    const job = queue.createJob({n});
    current = n;
    const heard = new Promise((resolve) => {
      giveUp = resolve;
      job.on('succeeded', () => resolve(false));
    });
    const started = performance.now();
    await job.save();
    if (await heard) lost += 1;
    else latencies.push(performance.now() - started);
  }
  clearInterval(watch);
  latencies = latencies.slice(order.warm_up).sort((one, other) => one - other);
  const at = (percent) => latencies[Math.floor((latencies.length * percent) / 100)] * 1000;
  report(latencies.length, latencies.reduce((sum, latency) => sum + latency) / 1000, {p50_us: at(50), p99_us: at(99), lost});
  await queue.close();
}

main();
