'use strict';

// A producer stores jobs that nobody takes, under the rules of bench/contestants/enqueue.py.

const Queue = require('bee-queue');
const {order, redis, report} = require('./order');

const queue = new Queue(order.queue, {redis, isWorker: false, getEvents: false, sendEvents: false, storeJobs: false});

async function saveInBatches() {
  for (let first = 0; first < order.jobs; first += order.batch) {
    const jobs = [];
    for (let n = first; n < Math.min(first + order.batch, order.jobs); n += 1) jobs.push(queue.createJob({n}));
    const failed = await queue.saveAll(jobs);
    for (const error of failed.values()) throw error;
  }
}

let next = 0;

async function saveOneByOne() {
  while (next < order.jobs) {
    const n = next;
    next += 1;
    await queue.createJob({n}).save();
  }
}

async function main() {
  await queue.ready();
  const started = performance.now();
  if (order.batch) {
    await saveInBatches();
  } else {
    await Promise.all(Array.from({length: order.in_flight}, saveOneByOne));
  }
  report(order.jobs, (performance.now() - started) / 1000);
  await queue.close();
}

main();
