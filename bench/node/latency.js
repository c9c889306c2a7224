'use strict';

// One job at a time, to a worker in another process: the rules are those of bench/contestants/latency.py. Should bee-queue
// lose a job's own event (its issue 189), the run ends with an error rather than never.

const Queue = require('bee-queue');
const {order, redis, report} = require('./order');

const LOST_AFTER_MS = 10_000;
const queue = new Queue(order.queue, {redis, isWorker: false, getEvents: true, sendEvents: false, storeJobs: true});

async function main() {
  await queue.ready();
  let latencies = [];
  let seen = -1;
  const watch = setInterval(() => {
    if (latencies.length === seen) throw new Error(`job ${seen} has not heard of its end`);
    seen = latencies.length;
  }, LOST_AFTER_MS);
  for (let n = 0; n < order.warm_up + order.jobs; n += 1) {
    const job = queue.createJob({n});
    const heard = new Promise((resolve) => { job.on('succeeded', resolve); });
    const started = performance.now();
    await job.save();
    await heard;
    latencies.push(performance.now() - started);
  }
  clearInterval(watch);
  latencies = latencies.slice(order.warm_up).sort((one, other) => one - other);
  const at = (percent) => latencies[Math.floor((order.jobs * percent) / 100)] * 1000;
  report(order.jobs, latencies.reduce((sum, latency) => sum + latency) / 1000, {p50_us: at(50), p99_us: at(99)});
  await queue.close();
}

main();
