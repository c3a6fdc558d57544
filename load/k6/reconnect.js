// Reconnects: each user connects, asks once, leaves, and comes again at once.
//
//   k6 run -e URL=http://127.0.0.1:8000 -e TOKENS=$PWD/tokens.txt load/k6/reconnect.js

import { check } from "k6";
import { Connection } from "./switchboard.js";

export { options } from "./switchboard.js";

export default () =>
  Connection.run(async (connection) => {
    const { status_code } = await connection.request(100, {});
    check(status_code, { "the first request is answered": (status) => status === 0 });
  });
