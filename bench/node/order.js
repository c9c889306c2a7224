'use strict';

// A contestant's order and the line that it prints, as bench/contestants/result.py for Python.

const order = JSON.parse(process.argv[2]);
const {protocol, pathname, hostname, port} = new URL(order.url);
const redis = protocol === 'unix:' ? {path: pathname} : {host: hostname, port: Number(port)};

function report(jobs, seconds, more) {
  const {user, system} = process.cpuUsage();
  const rss_kb = Math.round(process.memoryUsage.rss() / 1024);
  console.log(JSON.stringify({jobs, seconds, rss_kb, cpu_s: (user + system) / 1e6, ...more}));
}

module.exports = {order, redis, report};
