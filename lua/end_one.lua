-- Ends one session of a subject, by its id.
--   KEYS[1]     the session's hash
--   KEYS[2]     the subject's index
--   ARGV[1]     the session's id
--   ARGV[2]     '1' if this same call was sent before and may have run, else '0'
--   ARGV[3..]   each realm .. the subject
--   ARGV[last]  echo, behind every reply
-- Returns echo. Errors: NOSESSION, if it is not the subject's either.
local session, index, echo, id, again = KEYS[1], KEYS[2], ARGV[#ARGV], ARGV[1], ARGV[2]

local found = redis.call('HMGET', session, 'fp', 'sub')
if not found[1] and again == '1' then return echo end -- the work of the try before
local ours = false
for i = 3, #ARGV - 1 do ours = ours or found[2] == ARGV[i] end
if not ours then return redis.error_reply('NOSESSION ' .. echo) end
-- First what can fail: something else may stand at the index.
local left = redis.pcall('ZCARD', index)
if type(left) == 'table' then return redis.error_reply(tostring(left.err) .. ' ' .. echo) end
local removed = redis.pcall('ZREM', index, string.sub(found[1], 17, 32) .. id)
if type(removed) == 'table' then return redis.error_reply(tostring(removed.err) .. ' ' .. echo) end
left = left - removed
redis.call('UNLINK', session)
-- (alike in every script) The index ends with the last of its sessions. If there is none left, it is
-- gone, and in a slot that moves what is gone cannot be asked again.
local last = left > 0 and redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')[2]
if last then redis.call('PEXPIREAT', index, last) end
return echo
